"""The knapsack of widths: of each layer one pair, within so many bytes, so that the sum of what they hurt is least."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

CELLS = 200_000
"""How finely bytes are told apart. Beyond it costs are rounded up to cells: still within the bytes, nearly the best."""


class Pair(NamedTuple):
    """One way to keep a layer's keys and values: their widths, their bytes, and what it hurts by some measure."""

    key_bits: int
    value_bits: int
    nbytes: int
    hurt: float


def undominated(every: Sequence[Pair]) -> list[Pair]:
    """Returns the pairs that no other beats in both bytes and hurt, the smallest first: what may be chosen."""
    kept: list[Pair] = []
    for pair in sorted(every, key=lambda pair: (pair.nbytes, pair.hurt)):
        if not kept or pair.hurt < kept[-1].hurt:
            kept.append(pair)
    return kept


def knapsack(layers: Sequence[Sequence[Pair]], nbytes: int) -> list[Pair]:
    """Returns one pair a layer, of at most so many bytes together and of the least summed hurt.

    Raises:
        ValueError: not even the smallest pairs fit.
    """
    least = [min(pair.nbytes for pair in layer) for layer in layers]
    left = nbytes - sum(least)
    if left < 0:
        raise ValueError(f"nbytes: got {nbytes}, expected at least {sum(least)}")
    extras = [[pair.nbytes - low for pair in layer] for layer, low in zip(layers, least, strict=True)]
    unit = max(functools.reduce(math.gcd, (extra for layer in extras for extra in layer)), -(-left // CELLS), 1)
    costs = [[-(-extra // unit) for extra in layer] for layer in extras]
    best, choices = np.zeros(left // unit + 1), []
    for layer, cost in zip(layers, costs, strict=True):
        sums = np.stack([_shifted(best, step) + pair.hurt for pair, step in zip(layer, cost, strict=True)])
        choices.append(sums.argmin(0))
        best = sums.min(0)
    return _chosen(layers, costs, choices)


def _shifted(best: Float[np.ndarray, "c"], step: int) -> Float[np.ndarray, "c"]:
    """Returns the best sums within c cells after `step` cells were spent, infinite where there are not so many."""
    shifted = np.full(best.shape, np.inf)
    shifted[step:] = best[: max(0, len(best) - step)]
    return shifted


def _chosen(
    layers: Sequence[Sequence[Pair]], costs: Sequence[Sequence[int]], choices: Sequence[Int[np.ndarray, "c"]]
) -> list[Pair]:
    """Returns the pairs on the way to the best sum within all cells, followed back from the last layer."""
    cell, chosen = len(choices[0]) - 1, []
    for layer, cost, choice in zip(reversed(layers), reversed(costs), reversed(choices), strict=True):
        pick = int(choice[cell])
        chosen.append(layer[pick])
        cell -= cost[pick]
    return chosen[::-1]
