"""ADMM: weights that a mask allows, at least squares of a linear's output, by one inverse and one product a round.

Source: arXiv:2401.02938, algorithms 1 and 2, with W (in, out) as there. Per round, with M the mask:
Z = M (W + U); U = U + W - Z; W = (XX + rho I)^-1 (XX W0 + rho (Z - U)). Here one array is carried, A = W + U: then U is
A - Z, Z - U is A with its masked part negated, and with R = rho (XX + rho I)^-1 the new W is W0 + R (Z - U - W0).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import cho_solve
from jaxtyping import Array, Bool, Float, Int

from lmmjax.errors import InputError
from lmmjax.prune.lowest import lowest
from lmmjax.prune.masks import keep_n_of_m, zeroed

DAMPING = 0.1
"""Share of the mean of the normalised XX's diagonal that is added to it."""
PENALTY = 1.0
"""The paper's rho."""
ROUNDS = 20
GROWING = 15
"""Rounds in which a mask that is chosen grows; it stays for the others."""


class Solver(NamedTuple):
    """R = rho (XX + rho I)^-1 of inputs divided by their norms, and these norms."""

    inverse: Float[Array, "in in"]
    norm: Float[Array, "in"]


def prepare(gram: Float[Array, "in in"], where: str) -> Solver:
    """Returns what all linears with these inputs share; the scale of `gram` does not matter.

    Raises:
        InputError: not positive definite even when damped, or not finite; `where` names the layer.
    """
    solver = _solver(gram)
    if bool(jnp.isfinite(solver.inverse).all()):
        return solver
    raise InputError(
        f"{where}: got inputs whose second moments are not positive definite, or not finite, even with"
        f" {DAMPING + PENALTY:g} of their mean added; calibrate on more samples, or prune without a weight update"
    )


@jax.jit
def repair(weight: Float[Array, "in out"], solver: Solver, keep: Bool[Array, "in out"]) -> Float[Array, "in out"]:
    """Returns weights that are zero where they do not stay, and make up for it elsewhere. Source: algorithm 1."""
    start = _start(weight, solver)
    aim = lax.fori_loop(0, ROUNDS, lambda _, aim: _round(aim, start, solver, keep), start)
    return _back(aim, solver, keep, weight)


def choose(
    weight: Float[Array, "in out"], solver: Solver, drop: int
) -> tuple[Float[Array, "in out"], Bool[Array, "in out"]]:
    """Returns repaired weights, and which of them stay: all but `drop` times the outputs, wherever in the matrix.

    Source: algorithm 2. (The paper's release prunes all from the first round on, unless per output.)
    """
    return _chosen(weight, solver, _schedule(drop * weight.shape[1]), None)


def choose_pattern(
    weight: Float[Array, "in out"], solver: Solver, pattern: tuple[int, int]
) -> tuple[Float[Array, "in out"], Bool[Array, "in out"]]:
    """Returns repaired weights, and which of them stay: in the end N of each M inputs, and never fewer before."""
    n, m = pattern
    return _chosen(weight, solver, _schedule(weight.size // m * (m - n)), pattern)


@jax.jit
def _solver(gram: Float[Array, "in in"]) -> Solver:
    norm = jnp.sqrt(jnp.diagonal(gram))
    # The paper's epsilon, but relative: weights of inputs that were always zero are the first to go at every scale.
    floor = 1e-8 * jnp.max(norm)
    norm = norm + jnp.where(floor == 0, 1, floor)
    square = gram / norm / norm[:, None]
    damped = square + (DAMPING * jnp.mean(jnp.diagonal(square)) + PENALTY) * jnp.eye(len(gram))
    return Solver(PENALTY * cho_solve((jnp.linalg.cholesky(damped), True), jnp.eye(len(gram))), norm)


def _schedule(total: int) -> Int[Array, "n"]:
    """Returns how many weights are gone in each round in which the mask grows: fast at first, as a cubic."""
    left = ((GROWING - turn) ** 3 for turn in range(1, GROWING + 1))
    return jnp.asarray([total * (GROWING**3 - cube) // GROWING**3 for cube in left], jnp.int32)


@functools.partial(jax.jit, static_argnames="pattern")
def _chosen(
    weight: Float[Array, "in out"], solver: Solver, counts: Int[Array, "n"], pattern: tuple[int, int] | None
) -> tuple[Float[Array, "in out"], Bool[Array, "in out"]]:
    start = _start(weight, solver)

    def grow(index: Int[Array, ""], carry: tuple[Array, Array]) -> tuple[Array, Array]:
        size = jnp.abs(carry[0])
        if pattern is not None:
            size = jnp.where(keep_n_of_m(size, *pattern), jnp.inf, size)
        keep = ~lowest(size, counts[index])
        return _round(carry[0], start, solver, keep), keep

    aim, keep = lax.fori_loop(0, GROWING, grow, (start, jnp.ones(weight.shape, bool)))
    aim = lax.fori_loop(GROWING, ROUNDS, lambda _, aim: _round(aim, start, solver, keep), aim)
    return _back(aim, solver, keep, weight), keep


def _start(weight: Float[Array, "in out"], solver: Solver) -> Float[Array, "in out"]:
    """Returns the weights for inputs of norm 1, whose sizes are then Wanda's scores."""
    return weight.astype(jnp.float32) * solver.norm[:, None]


def _round(
    aim: Float[Array, "in out"], start: Float[Array, "in out"], solver: Solver, keep: Bool[Array, "in out"]
) -> Float[Array, "in out"]:
    """Returns the next A, from this one and W0: the module's formula."""
    step = jnp.matmul(solver.inverse, jnp.where(keep, aim, -aim) - start, precision=lax.Precision.HIGHEST)
    return start + step + jnp.where(keep, 0, aim)


def _back(
    aim: Float[Array, "in out"], solver: Solver, keep: Bool[Array, "in out"], weight: Float[Array, "in out"]
) -> Float[Array, "in out"]:
    return zeroed((aim / solver.norm[:, None]).astype(weight.dtype), keep)
