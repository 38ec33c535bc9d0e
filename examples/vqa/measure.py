"""How often whole answers are right, by type of question, beside two controls."""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Int

from examples.vqa.packing import Pack, Shares
from lmmjax.data import KINDS, Sample

ROWS = 64
"""Sequences judged at once; the last batch is filled up, so that one program serves all."""
Judge = Callable[[Int[np.ndarray, "r"], Int[np.ndarray, "r q"]], Bool[np.ndarray, "r q"]]
"""Whether greedy decoding would give the whole answer to each of these questions about these images."""


def report(
    judge: Judge,
    pack: Pack,
    samples: Sequence[Sample],
    shares: Shares,
    questions: int,
    seed: int,
    rows: int = ROWS,
) -> dict:
    """Returns the model's shares of right answers, and those of two controls that see no image or a wrong one."""
    shuffled = np.random.default_rng(seed).permutation(len(pack.shown))
    right = {
        "model": verdicts(judge, pack, questions, rows=rows),
        "shuffled images": verdicts(judge, pack, questions, shuffled, rows),
        "blind": blind(shares, samples),
    }
    return {"questions": len(samples), **{name: by_kind(each, pack.kinds) for name, each in right.items()}}


def verdicts(
    judge: Judge, pack: Pack, questions: int, shown: Int[np.ndarray, "i"] | None = None, rows: int = ROWS
) -> Bool[np.ndarray, "n"]:
    """Returns whether each question is answered right; `shown` says which image stands in for each."""
    images, chosen = pack.rows(questions)
    images = images if shown is None else shown[images]
    right = np.zeros(len(pack.blocks), bool)
    for start in range(0, len(chosen), rows):
        part = chosen[start : start + rows]
        filled = np.pad(part, ((0, rows - len(part)), (0, 0)), constant_values=-1)
        found = np.asarray(judge(np.resize(images[start : start + rows], rows), filled))[: len(part)]
        right[part[part >= 0]] = found[part >= 0]
    return right


def by_kind(right: Bool[np.ndarray, "n"], kinds: Int[np.ndarray, "n"]) -> dict[str, float]:
    """Returns the share of right answers, over all questions and of each type."""
    shares = {name: round(float(right[kinds == index].mean()), 4) for index, name in enumerate(KINDS)}
    return {"all": round(float(right.mean()), 4), **shares}


def blind(shares: Shares, samples: Sequence[Sample]) -> Bool[np.ndarray, "n"]:
    """Returns whether the training questions' commonest answer to the same text is right; a new text's is not."""
    best: dict[str, tuple[float, str]] = {}
    for (question, answer), share in shares.items():
        best[question] = max(best.get(question, (0.0, "")), (share, answer))
    return np.array([best.get(sample.question, (0.0, ""))[1] == sample.answer for sample in samples])
