"""Judged answers as columns whose sums make every published figure, so that one paired bootstrap serves them all."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Float

from lmmjax.intervals import Interval, resamples

Columns = Mapping[str, Float[np.ndarray, "n"]]
Sums = Mapping[str, Float[np.ndarray, "*draws"]]
Figures = dict[str, Float[np.ndarray, "*draws"]]


@dataclasses.dataclass(frozen=True)
class Sheet:
    """Row i is what unit i (a question, an image's pair of questions, a window of text) adds to each sum.

    `figures` computes the published figures from the columns' sums; it is given one sum a column, or as many as
    there are draws of the bootstrap. The first figure is the one that a benchmark is known by.
    """

    columns: Columns
    figures: Callable[[Sums], Figures]

    @property
    def values(self) -> dict[str, float]:
        """The figures of all rows; NaN where a figure is not defined."""
        sums = {name: np.asarray(np.sum(column, dtype=float)) for name, column in self.columns.items()}
        return {name: float(value) for name, value in self._figures(sums).items()}

    def resampled(self, seed: int = 0) -> Figures:
        """Returns the figures of rows drawn anew, the same rows for every sheet of as many."""
        matrix = np.stack([np.asarray(column, float) for column in self.columns.values()], axis=1)
        sums = np.concatenate([counts @ matrix for counts in resamples(len(matrix), seed)])
        return self._figures(dict(zip(self.columns, sums.T, strict=True)))

    def _figures(self, sums: Sums) -> Figures:
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            return self.figures(sums)


def intervals(sheet: Sheet) -> dict[str, Interval]:
    """Returns every figure's 95% interval."""
    return {name: _central(values) for name, values in sheet.resampled().items()}


def differences(ours: Sheet, other: Sheet) -> dict[str, tuple[float, Interval]]:
    """Returns ours minus the other's of every figure, with its 95% interval; rows are paired."""
    values, others = ours.values, other.values
    drawn, drawn_others = ours.resampled(), other.resampled()
    return {name: (values[name] - others[name], _central(drawn[name] - drawn_others[name])) for name in values}


def shares(marks: Sequence[float], kinds: Sequence[str], name: str = "accuracy") -> Sheet:
    """Returns the sheet of a mean mark over all questions, and over those of each kind ("" is none)."""
    marked, of = np.asarray(marks, float), np.asarray(kinds)
    columns = {"marks": marked, "count": np.ones(len(marked))}
    named = sorted(set(kinds) - {""})
    for kind in named:
        columns |= {f"marks {kind}": np.where(of == kind, marked, 0), f"count {kind}": np.where(of == kind, 1.0, 0)}

    def figures(sums: Sums) -> Figures:
        by_kind = {f"{name}: {kind}": sums[f"marks {kind}"] / sums[f"count {kind}"] for kind in named}
        return {name: sums["marks"] / sums["count"], **by_kind}

    return Sheet(columns, figures)


def perplexity(nll: Float[np.ndarray, "w"], tokens: Sequence[int] | np.ndarray) -> Sheet:
    """Returns the sheet of perplexity over windows of text."""
    columns = {"nll": np.asarray(nll, float), "tokens": np.asarray(tokens, float)}
    return Sheet(columns, lambda sums: {"perplexity": np.exp(sums["nll"] / sums["tokens"])})


def _central(values: Float[np.ndarray, "draws"]) -> Interval:
    """Returns the middle 95% of the draws in which the figure is defined."""
    defined = values[~np.isnan(values)]
    if not len(defined):
        return math.nan, math.nan
    low, high = np.quantile(defined, [0.025, 0.975])
    return float(low), float(high)
