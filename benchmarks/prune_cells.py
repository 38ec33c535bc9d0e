"""What the pruning benchmark measures: every score with every update, and every allocation, at every level."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lmmjax.prune.allocations import ALLOCATIONS
from lmmjax.prune.method import Method
from lmmjax.prune.scores import SCORES
from lmmjax.prune.targets import parse_pattern
from lmmjax.prune.updates import UPDATES

ALLOCATED = "lognorm"
"""The score under which allocations are compared."""
SAME_IN_PATTERNS = ("wanda-cumulative",)
"""Scores that order an output's weights as another does, so that a pattern is the same."""
PERMUTED = ("ria", "lognorm")
"""The scores that inputs are ordered by in patterns: whose idea it is, and the project's own."""


class Cell(NamedTuple):
    """A method at a level ("0.5" or "2:4"; "" is the dense model) under an allocation, calibrated by a seed."""

    level: str
    score: str = ""
    update: str = "none"
    allocation: str = "uniform"
    seed: int = 0
    permute: bool = False

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> "Cell":
        """Returns the cell of a row of figures, which may be older than some fields."""
        return cls(**{name: row[name] for name in cls._fields if name in row})

    @property
    def method(self) -> Method:
        """How its weights are pruned."""
        update = None if self.update == "none" or self.score in UPDATES else self.update
        return Method(self.score, update, parse_pattern(self.level) if ":" in self.level else None, self.permute)


def cells(levels: Sequence[str], seeds: int) -> Iterator[Cell]:
    """Yields the cells, a seed after the other: what a seed's statistics cost is paid once.

    An update that chooses its own mask is a score of its own. What no seed changes is measured for the first alone.
    """
    yield Cell("")
    for seed in range(seeds):
        for level in levels:
            yield from _plain(level, seed)
            yield from _updated(level, seed)
            yield from _permuted(level, seed)


def _plain(level: str, seed: int) -> Iterator[Cell]:
    """Yields every score without an update, and every allocation."""
    for score in _scores(level):
        if not (seed and score == "magnitude"):
            yield Cell(level, score, seed=seed)
    for allocation in ALLOCATIONS if ":" not in level else ():
        if allocation != "uniform" and not (seed and allocation == "alphapruning"):
            yield Cell(level, ALLOCATED, allocation=allocation, seed=seed)


def _updated(level: str, seed: int) -> Iterator[Cell]:
    for update in UPDATES:
        for score in (update, *_scores(level)):
            yield Cell(level, score, update, seed=seed)


def _permuted(level: str, seed: int) -> Iterator[Cell]:
    for score in PERMUTED if ":" in level else ():
        for update in ("none", *UPDATES):
            yield Cell(level, score, update, seed=seed, permute=True)


def _scores(level: str) -> list[str]:
    return [name for name in SCORES if not (":" in level and name in SAME_IN_PATTERNS)]
