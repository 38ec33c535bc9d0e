"""A way to prune a linear: what scores its weights, what repairs those that stay, and whether in a pattern."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lmmjax.calibrate.statistics import LayerStatistics, LinearStatistics
from lmmjax.errors import InputError
from lmmjax.linears import SHARED, kernel_of, with_kernels
from lmmjax.llava import Params
from lmmjax.prune.lowest import lowest
from lmmjax.prune.masks import keep_n_of_m, zeroed
from lmmjax.prune.permute import keep_n_of_m_permuted, permutation
from lmmjax.prune.scores import SCORES
from lmmjax.prune.updates import UPDATES

NAMES = (*SCORES, *UPDATES)
"""What a method may be called: a score, or an update that chooses its own mask."""
Pattern = tuple[int, int]


class Pruned(NamedTuple):
    """A linear's new weights, which stay, and in which order of inputs a pattern holds (None: in their own)."""

    weight: Float[Array, "in out"]
    keep: Bool[Array, "in out"]
    order: Int[Array, "in"] | None = None


@dataclasses.dataclass(frozen=True)
class Method:
    """`name` is one of NAMES; `update` one of UPDATES, or None: what stays is left as it is.

    `permute` looks for an order of inputs in which the pattern keeps more of the score.
    """

    name: str
    update: str | None = None
    pattern: Pattern | None = None
    permute: bool = False

    def __post_init__(self):
        if self.name not in NAMES:
            raise InputError(f"method: got {self.name!r}, expected one of {', '.join(NAMES)}")
        if self.update not in (None, *UPDATES):
            raise InputError(f"update: got {self.update!r}, expected one of {', '.join(UPDATES)}, or none")
        if self.name in UPDATES and self.update is not None:
            raise InputError(
                f"update: {self.name} updates weights by itself; leave it out, or choose a score as method"
            )
        if self.permute and (self.pattern is None or self.name in UPDATES):
            raise InputError("permute: finds an order of inputs for a pattern N:M and a score; give both")

    @property
    def label(self) -> str:
        """What the method is called in tables."""
        return self.name + (f" + {self.update}" if self.update else "") + (", permuted" if self.permute else "")

    @property
    def replayable(self) -> bool:
        """Whether counts, score and calibration say all: no update, no pattern, nothing but mean squares read."""
        return self.name in SCORES and not self.gradients and self.update is None and self.pattern is None

    @property
    def grams(self) -> bool:
        """Whether it reads Gram matrices."""
        return self.update is not None or self.name in UPDATES

    @property
    def gradients(self) -> bool:
        """Whether it reads gradients."""
        return self.name in SCORES and SCORES[self.name].gradients

    def layer(
        self, layer: Params, stats: LayerStatistics, drops: Mapping[str, int], where: str
    ) -> tuple[Params, dict[str, Pruned]]:
        """Returns the layer with so many inputs of each linear's outputs dropped, and what became of each.

        A pattern takes the place of the counts. `where` names the layer in errors.

        Raises:
            InputError: the pattern does not fit a linear, weights or gradients are not finite, or an update's matrix
                is not positive definite.
        """
        found: dict[str, Pruned] = {}
        for first, names in SHARED.items():
            touched = [name for name in names if self.pattern or drops[name]]
            prepared = self._prepared(stats[first], f"{where}, {first}") if touched else None
            for name in touched:
                _require_finite(kernel_of(layer, name), stats[name].gradient, f"{where}, {name}")
                found[name] = self.linear(kernel_of(layer, name), stats[name], drops[name], prepared)
        return with_kernels(layer, {name: pruned.weight for name, pruned in found.items()}), found

    def linear(
        self, weight: Float[Array, "in out"], stats: LinearStatistics, drop: int, prepared: Any = None
    ) -> Pruned:
        """Returns what becomes of one linear; `prepared` is what an update made of the Gram matrix."""
        if self.name in UPDATES:
            return Pruned(*UPDATES[self.name].choose(weight, prepared, drop, self.pattern))
        keep, order = self._mask(weight, stats, drop)
        if self.update is None:
            return Pruned(zeroed(weight, keep), keep, order)
        return Pruned(UPDATES[self.update].repair(weight, prepared, keep), keep, order)

    def _prepared(self, stats: LinearStatistics, where: str):
        if not self.grams:
            return None
        assert stats.gram is not None, "an update reads Gram matrices; calibrate with grams"
        return UPDATES[self.update or self.name].prepare(stats.gram, where)

    def _mask(self, weight: Array, stats: LinearStatistics, drop: int) -> tuple[Array, Int[Array, "in"] | None]:
        stats = stats.replace(gram=None)  # no score reads it, and it is the largest of all
        if self.pattern is None:
            return _lowest(self.name, weight, stats, jnp.asarray(drop)), None
        if not self.permute:
            return _pattern(self.name, self.pattern, weight, stats), None
        score = SCORES[self.name].rule(weight, stats)
        order = permutation(score, *self.pattern)
        return keep_n_of_m_permuted(score, *self.pattern, order), jnp.asarray(order)


def _require_finite(weight: Array, gradient: Array | None, where: str) -> None:
    for what, array in (("weights", weight), ("gradients", gradient)):
        if array is not None and not bool(jnp.isfinite(array).all()):
            raise InputError(f"{where}: got {what} that are inf or NaN, expected finite ones; nothing can rank them")


@functools.partial(jax.jit, static_argnums=0)
def _lowest(name: str, weight: Array, stats: LinearStatistics, drop: Array) -> Bool[Array, "in out"]:
    score = SCORES[name]
    count = drop * weight.shape[1] if score.over == "matrix" else drop
    return ~lowest(score.rule(weight, stats), count, score.over)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _pattern(name: str, pattern: Pattern, weight: Array, stats: LinearStatistics) -> Bool[Array, "in out"]:
    return keep_n_of_m(SCORES[name].rule(weight, stats), *pattern)
