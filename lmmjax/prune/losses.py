"""What pruning did to a linear: the share of its weights that went, and how far its output is off."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lmmjax.prune.method import Pruned


class Loss(NamedTuple):
    """One linear's figures. `error` is ||X W - X W'|| / ||X W|| over the calibration's tokens, None without Grams."""

    layer: int
    linear: str
    weights: int
    dropped: int
    error: float | None

    @property
    def sparsity(self) -> float:
        return self.dropped / self.weights


def measure(
    layer: int, linear: str, weight: Float[Array, "in out"], pruned: Pruned | None, gram: Float[Array, "in in"] | None
) -> Loss:
    """Returns a linear's figures; weights that were zero before count as dropped only if the mask says so.

    None in the place of what became of it: it was left alone.
    """
    if pruned is None:
        return Loss(layer, linear, weight.size, 0, None if gram is None else 0.0)
    error = None if gram is None else float(_error(weight, pruned.weight, gram))
    return Loss(layer, linear, weight.size, int(weight.size - pruned.keep.sum()), error)


@jax.jit
def _error(before: Float[Array, "in out"], after: Float[Array, "in out"], gram: Float[Array, "in in"]) -> Array:
    def energy(matrix: Array) -> Array:
        matrix = matrix.astype(jnp.float32)
        return jnp.sum(matrix * jnp.matmul(gram, matrix, precision=jax.lax.Precision.HIGHEST))

    whole = energy(before)
    lost = jnp.maximum(energy(before.astype(jnp.float32) - after.astype(jnp.float32)), 0)
    return jnp.sqrt(lost / jnp.where(whole > 0, whole, 1))  # an output that is always zero can lose nothing
