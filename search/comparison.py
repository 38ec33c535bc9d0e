"""The searched plan beside its baselines: dense, and uniform pruning by the usual scores under the same two budgets."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from lmmjax.config import LINEARS
from lmmjax.intervals import bootstrap, wilson
from lmmjax.likelihood import Result
from lmmjax.prune.transform import Ranks
from search.objective import Evaluator, perplexity
from search.settings import BASELINES
from search.space import Candidate, Space, dense

Measure = Callable[[Result], float]


@dataclasses.dataclass(frozen=True)
class Contender:
    """A row of the comparison: an allocation, and the order in which weights go."""

    name: str
    candidate: Candidate
    ranks: Ranks


def contenders(
    space: Space, rank: Callable[[str], Ranks], searched: Candidate, score: str, on_search: Evaluator, measure: Measure
) -> Iterator[Contender]:
    """Yields dense, uniform by the usual scores and the search's, wanda with two other caches, and what was searched.

    The uniform widths are the best of those that fit, by the search's own objective on the search set: a
    baseline gets the same look at the data as the search. Widths alike everywhere leave bytes over; "slack
    filled" spends those on wider sides, as the search's plans do. The third cache is the dense one.
    """
    layers = space.weights.text.layers
    nothing = dense(layers)
    yield Contender("dense", nothing, rank(score))
    alike = [
        Candidate(space.weights.uniform(), np.full(layers, k), np.full(layers, v)) for k, v in space.cache.uniform()
    ]
    for name in dict.fromkeys((*BASELINES, score)):
        ranks = rank(name)
        best = min(alike, key=lambda candidate: measure(on_search(candidate, ranks)))
        yield Contender(f"uniform {name}", best, ranks)
        if name == "wanda" and space.cache.keep < 1:
            filled = min(space.uniform(), key=lambda candidate: measure(on_search(candidate, ranks)))
            yield Contender("uniform wanda, slack filled", filled, ranks)
            yield Contender("uniform wanda, dense cache", nothing._replace(drops=best.drops), ranks)
    yield Contender("searched", searched, rank(score))


def row(contender: Contender, result: Result, space: Space, tokens: str) -> dict[str, Any]:
    """Returns what the report says of a contender: its size, and its quality with 95% intervals.

    Perplexity is said where all text tokens were counted: over an answer's one or two it means little.
    """
    candidate = contender.candidate
    right, n = int(np.sum(result.sums.correct)), len(result.kinds)
    return {
        "name": contender.name,
        "weights_kept": space.weights.kept(candidate.drops),
        "kv_bytes": space.cache.nbytes(candidate.key_bits, candidate.value_bits),
        "kv_share": space.cache.share(candidate.key_bits, candidate.value_bits),
        "key_bits": candidate.key_bits.tolist(),
        "value_bits": candidate.value_bits.tolist(),
        "kl": result.kl,
        "kl_interval": bootstrap(result.sums.kl, result.sums.tokens),
        "nll": result.nll,
        **({"ppl": perplexity(result)} if tokens == "text" else {}),
        "accuracy": result.accuracy,
        "accuracy_interval": wilson(right, n),
        "by_kind": result.by_kind,
    }


def differences(results: Mapping[str, Result]) -> dict[str, Any]:
    """Returns searched minus each uniform baseline, question by question, with 95% intervals."""
    ours = results["searched"]
    return {
        name: {
            "accuracy": ours.accuracy - other.accuracy,
            "accuracy_interval": bootstrap(ours.sums.correct.astype(float) - other.sums.correct),
            "kl": ours.kl - other.kl,
            "kl_interval": bootstrap(ours.sums.kl - other.sums.kl, ours.sums.tokens),
        }
        for name, other in results.items()
        if name.startswith("uniform")
    }


def allocation(candidate: Candidate, space: Space) -> dict[str, Any]:
    """Returns the allocation as tables: sparsity per layer and linear, bits per layer."""
    return {
        "linears": list(LINEARS),
        "sparsity": (candidate.drops / space.weights.inputs).tolist(),
        "key_bits": candidate.key_bits.tolist(),
        "value_bits": candidate.value_bits.tolist(),
    }
