"""SparseGPT: inputs in turn, and what dropping weights of one does wrong is made up for by the weights of later ones.

Source: arXiv:2301.00774, algorithm 1. Its W is (out, in): a column there is an input, a row of the kernel, here. The
numbers are the algorithm's, the order of work is not: an input collects what earlier ones owe it when its turn comes,
and so does every group of inputs, in levels, so that nearly all arithmetic is large matrix products.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Bool, Float, Int

from lmmjax.errors import InputError
from lmmjax.prune.lowest import lowest
from lmmjax.prune.masks import keep_n_of_m, zeroed

BLOCK = 128
"""Inputs among whose weights, of all outputs, the method chooses at once."""
STEP = 16
"""Inputs between a block and a single one: that many rows stay in a core's nearest cache."""
DAMPING = (0.01, 0.1)
"""Shares of the mean of H's diagonal that are added to it; the second where the first does not suffice."""

Choice = Callable[[Int[Array, ""], Float[Array, "n out"]], Bool[Array, "n out"]]
"""From a group's index and its weights over U's diagonal, in size, to which of them stay."""
Level = tuple[int, Choice | None]
"""How many inputs a group has, and what chooses from it when its turn comes; None where that is done elsewhere."""


class Factor(NamedTuple):
    """The upper triangular U of H^-1 = Uᵀ U, and which inputs were always zero."""

    upper: Float[Array, "in in"]
    dead: Bool[Array, "in"]


class Band(NamedTuple):
    """Consecutive inputs: weights, which of them stay, and errors: what went, over U's diagonal; zero until it goes."""

    weights: Float[Array, "n out"]
    keep: Bool[Array, "n out"]
    errors: Float[Array, "n out"]


def prepare(gram: Float[Array, "in in"], where: str) -> Factor:
    """Returns what all linears with these inputs share; the scale of `gram` does not matter.

    Raises:
        InputError: not positive definite even with the larger damping, or not finite; `where` names the layer.
    """
    for damping in DAMPING:
        factor = _factor(gram, damping)
        if bool(jnp.isfinite(factor.upper).all()):
            return factor
    raise InputError(
        f"{where}: got inputs whose second moments are not positive definite, or not finite, even with"
        f" {DAMPING[-1]:g} of their mean added; calibrate on more samples, or prune without a weight update"
    )


def repair(
    weight: Float[Array, "in out"], factor: Factor, keep: Bool[Array, "in out"], block: int = BLOCK
) -> Float[Array, "in out"]:
    """Returns weights that are zero where they do not stay, and make up for it elsewhere.

    Those of inputs that were always zero make up for nothing and stay as they are, where they stay: the source drops
    them too, beyond what was asked for. `block` decides about speed alone.
    """
    return _repaired(weight, factor, keep, block)


def choose(
    weight: Float[Array, "in out"], factor: Factor, drop: int, block: int = BLOCK
) -> tuple[Float[Array, "in out"], Bool[Array, "in out"]]:
    """Returns repaired weights, and which of them stay: all but `drop` times the outputs of the matrix.

    Each block of inputs loses the same share; what is rounded there is made up for in the next one.
    """
    inputs, outputs = weight.shape
    ends = np.minimum(np.arange(block, inputs + block, block), inputs)
    counts = np.diff(drop * outputs * ends // inputs, prepend=0)
    return _chosen(weight, factor, jnp.asarray(counts, jnp.int32), block)


@functools.partial(jax.jit, static_argnames="pattern")
def choose_pattern(
    weight: Float[Array, "in out"], factor: Factor, pattern: tuple[int, int]
) -> tuple[Float[Array, "in out"], Bool[Array, "in out"]]:
    """Returns repaired weights, and which of them stay: N of M inputs, chosen when the group's turn comes."""
    n, m = pattern
    step = _multiple(m, STEP)
    levels = [(_multiple(step, BLOCK), None), (step, None), (m, lambda _, size: keep_n_of_m(size, n, m))]
    return _pruned(weight, factor, jnp.ones(weight.shape, bool), levels)


@jax.jit
def _factor(gram: Float[Array, "in in"], damping: float) -> Factor:
    diagonal = jnp.diagonal(gram)
    dead = diagonal == 0
    # In units of the mean over live inputs, so that the paper's 1 for dead ones means the same at every scale.
    mean = jnp.sum(diagonal) / jnp.maximum(jnp.sum(~dead), 1)
    hessian = gram / jnp.where(mean == 0, 1, mean) + jnp.diag(damping + dead)
    # With its order reversed, H's own factor is, inverted, that of H^-1: no inverse, no second factorization.
    lower = jnp.linalg.cholesky(hessian[::-1, ::-1])
    return Factor(solve_triangular(lower, jnp.eye(len(gram)), lower=True)[::-1, ::-1], dead)


@functools.partial(jax.jit, static_argnames="block")
def _repaired(
    weight: Float[Array, "in out"], factor: Factor, keep: Bool[Array, "in out"], block: int
) -> Float[Array, "in out"]:
    return _pruned(weight, factor, keep, [(block, None), (math.gcd(block, STEP), None)])[0]


@functools.partial(jax.jit, static_argnames="block")
def _chosen(
    weight: Float[Array, "in out"], factor: Factor, counts: Int[Array, "n"], block: int
) -> tuple[Float[Array, "in out"], Bool[Array, "in out"]]:
    def choice(index: Int[Array, ""], size: Float[Array, "n out"]) -> Bool[Array, "n out"]:
        real = index * block + jnp.arange(block) < len(weight)
        return ~lowest(jnp.where(real[:, None], size, jnp.inf), counts[index])

    levels = [(block, choice), (math.gcd(block, STEP), None)]
    return _pruned(weight, factor, jnp.ones(weight.shape, bool), levels)


def _pruned(
    weight: Float[Array, "in out"], factor: Factor, keep: Bool[Array, "in out"], levels: list[Level]
) -> tuple[Float[Array, "in out"], Bool[Array, "in out"]]:
    """Returns weights and mask, in float32 between; rows that touch nothing fill the last block."""
    inputs = len(weight)
    beyond = -inputs % levels[0][0]
    upper = jnp.eye(inputs + beyond).at[:inputs, :inputs].set(factor.upper)
    # Of no worth while a mask is chosen, so that they go first.
    weights = jnp.where(factor.dead[:, None], 0, weight.astype(jnp.float32))
    weights, keep = (jnp.pad(x, ((0, beyond), (0, 0))) for x in (weights, keep))
    band = _eliminate(Band(weights, keep, jnp.zeros_like(weights)), upper, [*levels, (1, None)])
    keep, found = band.keep[:inputs], band.weights[:inputs].astype(weight.dtype)
    return zeroed(jnp.where(factor.dead[:, None], weight, found), keep), keep


def _eliminate(band: Band, upper: Float[Array, "n n"], levels: list[Level]) -> Band:
    """Returns the band after the turn of all its inputs: group by group, and these by the levels below."""
    if not levels:
        return band._replace(errors=jnp.where(band.keep, 0, band.weights) / upper)
    (size, choice), *below = levels

    def turn(index: Int[Array, ""], band: Band) -> Band:
        start = index * size
        group = jax.tree.map(lambda rows: lax.dynamic_slice_in_dim(rows, start, size), band)
        own = lax.dynamic_slice(upper, (start, start), (size, size))
        group = group._replace(weights=group.weights - _owed(band.errors, upper, start, size))
        if choice is not None:
            group = group._replace(keep=choice(index, jnp.abs(group.weights / jnp.diagonal(own)[:, None])))
        group = _eliminate(group, own, below)
        return jax.tree.map(lambda whole, rows: lax.dynamic_update_slice_in_dim(whole, rows, start, 0), band, group)

    return lax.fori_loop(0, len(upper) // size, turn, band)


def _owed(
    errors: Float[Array, "n out"], upper: Float[Array, "n n"], start: Int[Array, ""], size: int
) -> Float[Array, "size out"]:
    """Returns what earlier errors of the band change in a group's weights.

    In chunks, up to the one that holds the group: half the work, where there are many.
    """
    groups = len(upper) // size
    chunk = len(upper) if len(upper) <= BLOCK else size * next(n for n in (4, 3, 2, 1) if groups % n == 0)

    def add(index: Int[Array, ""], total: Float[Array, "size out"]) -> Float[Array, "size out"]:
        at = index * chunk
        rows = lax.dynamic_slice(upper, (at, start), (chunk, size))
        past = lax.dynamic_slice_in_dim(errors, at, chunk)
        return total + jnp.einsum("io,ij->jo", past, rows, precision=lax.Precision.HIGHEST)

    nothing = jnp.zeros((size, errors.shape[1]))
    return add(jnp.int32(0), nothing) if chunk == len(upper) else lax.fori_loop(0, -(-start // chunk), add, nothing)


def _multiple(part: int, size: int) -> int:
    """Returns the largest multiple of `part` up to `size`, but at least `part`."""
    return max(size // part, 1) * part
