"""How much of each linear is to go: by a sparsity and its allocation, by a plan, or by a pattern."""

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int

from lmmjax.calibrate.loss import Loss
from lmmjax.config import LINEARS, TextConfig
from lmmjax.errors import InputError
from lmmjax.linears import named
from lmmjax.plan import Plan
from lmmjax.prune.allocations import ALLOCATIONS, Evidence, allocate
from lmmjax.prune.method import Pattern

if TYPE_CHECKING:
    from lmmjax.prune.passes import Passes

Drops = list[dict[str, int]]
MOST = 64
"""The largest M of a pattern: each of a group is compared with all others."""


@dataclasses.dataclass(frozen=True)
class Targets:
    """One of the three: `sparsity`, allocated by `allocation`, `plan`, or `pattern`, for which counts are derived."""

    sparsity: float | None
    pattern: Pattern | None
    plan: Plan | None
    allocation: str = "uniform"

    def __post_init__(self):
        given = [self.sparsity, self.pattern, self.plan]
        if sum(one is not None for one in given) != 1:
            raise InputError("--sparsity, --pattern, --plan: expected exactly one of them")
        if self.sparsity is not None and not 0 < self.sparsity < 1:
            raise InputError(f"--sparsity: got {self.sparsity:g}, expected the share of the weights to drop, 0 < S < 1")
        if self.allocation != "uniform" and self.sparsity is None:
            raise InputError(f"--allocation: got {self.allocation} without --sparsity, which it allocates")

    def check(self, text: TextConfig) -> None:
        """Raises InputError where the plan or the pattern does not fit a model of this shape."""
        if self.plan is not None:
            self.plan.check(text)
        if self.pattern is not None:
            for name in LINEARS:
                if (inputs := text.linear_shape(name)[0]) % self.pattern[1]:
                    n, m = self.pattern
                    raise InputError(
                        f"--pattern: got {n}:{m}, but {name} has {inputs} inputs; expected M to divide them"
                    )

    def drops(self, passes: "Passes", seed: int = 0) -> Drops:
        """Returns the inputs to drop of each output, layer by layer; an allocation looks at the model for it.

        Raises:
            InputError: nothing would be dropped.
        """
        found = self._counts(passes, seed)
        if not any(count for row in found for count in row.values()):
            raise InputError("--sparsity, --plan: not one input of any linear would be dropped; ask for more")
        return found

    def _counts(self, passes: "Passes", seed: int) -> Drops:
        text = passes.model.config.text
        if self.plan is not None:
            return [dict(layer.drop) for layer in self.plan.layers]
        if self.pattern is not None:
            n, m = self.pattern
            return [{name: text.linear_shape(name)[0] // m * (m - n) for name in LINEARS}] * text.layers
        return [named(row) for row in self._allocated(passes, seed)]

    def _allocated(self, passes: "Passes", seed: int) -> Int[np.ndarray, "l 7"]:
        assert self.sparsity is not None
        chosen, model = ALLOCATIONS[self.allocation], passes.model
        evidence = Evidence(
            model.config.text,
            self.sparsity,
            model.layer,
            passes.statistics() if chosen.needs_statistics else (),
            Loss(model, passes.rows()) if chosen.needs_loss else None,
            seed,
        )
        return allocate(self.allocation, evidence)


def parse_pattern(given: str | None) -> Pattern | None:
    """Returns (N, M) of "N:M".

    Raises:
        InputError: it is no such pattern.
    """
    if given is None:
        return None
    parts = given.split(":")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts) or not 0 < int(parts[0]) < int(parts[1]) <= MOST:
        raise InputError(f"--pattern: got {given!r}, expected N:M with 0 < N < M <= {MOST}, such as 2:4")
    return int(parts[0]), int(parts[1])
