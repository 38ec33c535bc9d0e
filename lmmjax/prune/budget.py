"""The weights' budget: projects wished sparsities onto it exactly, before anything is evaluated.

A wish says what a candidate wants of a linear relative to the others. The projection shifts all wishes by one
number until the budget is met, so it keeps their order, and ends in whole counts of dropped inputs. No trial is
thrown away for missing the budget.
"""

import dataclasses
import functools

import numpy as np
from jaxtyping import Float, Int

from lmmjax.config import LINEARS, TextConfig
from lmmjax.errors import InputError


@dataclasses.dataclass(frozen=True)
class WeightBudget:
    """The share `keep` of the prunable weights stays; a linear's wished sparsity is within 1 - keep +- box."""

    text: TextConfig
    keep: float
    box: float = 0.15

    def __post_init__(self):
        if not 0 < self.keep <= 1:
            raise InputError(f"--budget: got {self.keep:g}, expected the share of the weights to keep, 0 < share <= 1")
        if not 0 <= self.box <= 1:
            raise InputError(f"--box: got {self.box:g}, expected a half-width between 0 and 1, such as 0.15")

    @property
    def low(self) -> float:
        return max(0.0, 1 - self.keep - self.box)

    @property
    def high(self) -> float:
        return min(1.0, 1 - self.keep + self.box)

    @functools.cached_property
    def inputs(self) -> Int[np.ndarray, "l 7"]:
        return np.tile([self.text.linear_shape(name)[0] for name in LINEARS], (self.text.layers, 1))

    @functools.cached_property
    def outputs(self) -> Int[np.ndarray, "l 7"]:
        """What dropping one more input of a linear saves: one weight in each of its output rows."""
        return np.tile([self.text.linear_shape(name)[1] for name in LINEARS], (self.text.layers, 1))

    def kept(self, drops: Int[np.ndarray, "l 7"]) -> float:
        """Returns the share of the prunable weights that these counts keep."""
        return 1 - float((drops * self.outputs).sum() / (self.inputs * self.outputs).sum())

    def project(self, wish: Float[np.ndarray, "l 7"]) -> Int[np.ndarray, "l 7"]:
        """Returns inputs to drop, such that `kept` is `keep` as nearly as whole inputs allow.

        The error is at most half the rows of the smallest linear, as a share of all weights: 3e-7 for LLaVA-1.5
        7B. (Half those of the largest, where the smaller ones have no input left to drop.) Counts are near
        the shifted wish, which lies in the box: what is left for no larger linear goes to the smallest, so its count
        may be above by as many inputs as the largest linear has times its rows.
        """
        wish = np.clip(wish, self.low, self.high)
        ratio = np.clip(wish + self._shift(wish), self.low, self.high)
        total = (1 - self.keep) * (self.inputs * self.outputs).sum()
        counts = round_counts((ratio * self.inputs).ravel(), self.outputs.ravel(), self.inputs.ravel(), total)
        return counts.reshape(wish.shape).astype(np.int32)

    def uniform(self) -> Int[np.ndarray, "l 7"]:
        """Returns the allocation that treats all linears alike under this budget."""
        return self.project(np.full(self.inputs.shape, 1 - self.keep))

    def _shift(self, wish: Float[np.ndarray, "l 7"]) -> float:
        """Returns the number that brings the clipped sum to the budget; monotone, so bisection finds it."""
        weights = self.inputs * self.outputs
        low, high = -1.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            dropped = (weights * np.clip(wish + middle, self.low, self.high)).sum() / weights.sum()
            low, high = (middle, high) if dropped < 1 - self.keep else (low, middle)
        return (low + high) / 2


def round_counts(
    real: Float[np.ndarray, "n"], costs: Int[np.ndarray, "n"], limits: Int[np.ndarray, "n"], total: float
) -> Int[np.ndarray, "n"]:
    """Returns whole counts near `real` whose cost is as near `total` as the cheapest count allows.

    Largest remainder: from the floors up, those that lost most first, ties in order; what does not fit any more
    is passed over for something cheaper.
    """
    counts = np.minimum(np.floor(real + 1e-9).astype(np.int64), limits)
    order = np.argsort(counts - real, kind="stable")
    left = total - float((counts * costs).sum())
    fits = True
    while fits:
        fits = False
        for i in order:
            if costs[i] <= left + 1e-6 and counts[i] < limits[i]:
                counts[i] += 1
                left -= float(costs[i])
                fits = True
    room = [i for i in order if counts[i] < limits[i]]
    cheapest = min(room, key=lambda i: costs[i], default=None)
    if cheapest is not None and 2 * left > costs[cheapest]:
        counts[cheapest] += 1
    return counts
