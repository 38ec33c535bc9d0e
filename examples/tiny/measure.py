"""How often whole answers are right, by type of question, beside two controls; and a picture of the run."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int

from examples.tiny.learning import judge
from examples.tiny.packing import Pack, Shares
from lmmjax.data import KINDS, Sample
from lmmjax.llava import Params

ROWS = 64
"""Sequences judged at once; the last batch is filled up, so that one program serves all."""


def report(params: Params, pack: Pack, samples: Sequence[Sample], shares: Shares, questions: int, seed: int) -> dict:
    """Returns the model's shares of right answers, and those of two controls that see no image or a wrong one."""
    shuffled = np.random.default_rng(seed).permutation(len(pack.pixels))
    right = {
        "model": verdicts(params, pack, questions),
        "shuffled images": verdicts(params, pack, questions, shuffled),
        "blind": blind(shares, samples),
    }
    return {"questions": len(samples), **{name: by_kind(each, pack.kinds) for name, each in right.items()}}


def verdicts(
    params: Params, pack: Pack, questions: int, shown: Int[np.ndarray, "i"] | None = None
) -> Bool[np.ndarray, "n"]:
    """Returns whether each question is answered right; `shown` says which image stands in for each."""
    images, chosen = pack.rows(questions)
    images = images if shown is None else shown[images]
    right = np.zeros(len(pack.blocks), bool)
    for start in range(0, len(chosen), ROWS):
        part = chosen[start : start + ROWS]
        tokens, is_answer = pack.tokens(np.pad(part, ((0, ROWS - len(part)), (0, 0)), constant_values=-1))
        pixels = pack.pixels[np.resize(images[start : start + ROWS], ROWS)]
        found = np.asarray(judge(params, pixels, tokens, is_answer))[: len(part)]
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


def draw(log: Path, final: dict, picture: Path) -> None:
    """Draws loss and held-out accuracy over the steps, and the final test figures beside the controls."""
    from matplotlib.figure import Figure

    lines = [json.loads(line) for line in log.read_text().splitlines()]
    checks = [line for line in lines if "all" in line]
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    losses, held, test = figure.subplots(1, 3)
    for stage in ("look", "answer"):
        part = [line for line in lines if line["stage"] == stage]
        losses.plot([line["step"] for line in part], [line["loss"] for line in part], label=stage)
    losses.set(title="training loss", xlabel="step", yscale="log")
    losses.legend(fontsize=8)
    for kind in ("all", *KINDS):
        held.plot([line["step"] for line in checks], [line[kind] for line in checks], marker=".", label=kind)
    held.legend(fontsize=8)
    held.set(title="answered right, held-out training images", xlabel="step", ylim=(0, 1.02))
    names = [name for name in final if name != "questions"]
    for index, name in enumerate(names):
        places = np.arange(len(KINDS) + 1) + 0.27 * (index - 1)
        bars = test.bar(places, list(final[name].values()), 0.26, label=name)
        test.bar_label(bars, fmt="%.2f", fontsize=7)
    test.set(
        title=f"answered right, {final['questions']:,} test questions", ylim=(0, 1.25), yticks=np.arange(0, 1.1, 0.2)
    )
    test.set_xticks(range(len(KINDS) + 1), ["all", *KINDS])
    test.legend(fontsize=8, loc="upper center", ncols=len(names), frameon=False)
    for axes in (losses, held, test):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=110)
