"""From scores to masks, always by rank: a threshold would drop too many where scores are equal."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lmmjax.errors import InputError


def rank(score: Float[Array, "in out"], over: str = "output") -> Int[Array, "in out"]:
    """Returns each weight's place among its output's weights, 0 the lowest; equal scores rank by position.

    Over the whole "matrix" each place from 0 to in - 1 is taken by as many weights as there are outputs, wherever these
    are. So in both ways, what ranks below n is n weights for every output.
    """
    if over == "matrix":
        places = rank(score.reshape(-1, 1)) // score.shape[1]
        return places.reshape(score.shape)
    inputs = score.shape[0]
    places = jnp.arange(inputs, dtype=jnp.uint16 if inputs <= 1 << 16 else jnp.int32)[:, None]
    order = jnp.argsort(score, axis=0, stable=True)
    # Turned round by a scatter: a second sort would take as long as the first.
    return jnp.put_along_axis(jnp.zeros(score.shape, places.dtype), order, places, axis=0, inplace=False)


def drop_lowest(ranks: Int[Array, "in out"], count: int | Int[Array, ""]) -> Bool[Array, "in out"]:
    """Returns the mask that drops exactly the `count` lowest of every output; `count` may be traced."""
    return ranks >= jnp.asarray(count)


def keep_n_of_m(score: Float[Array, "in out"], n: int, m: int) -> Bool[Array, "in out"]:
    """Returns the mask that keeps the n highest of each m consecutive inputs (2:4 is n = 2, m = 4).

    Raises:
        InputError: n > m, or m does not divide the inputs.
    """
    inputs, outputs = score.shape
    if not 0 < n <= m or inputs % m:
        raise InputError(f"pattern: got {n}:{m} for {inputs} inputs, expected 0 < N <= M and M a divisor of the inputs")
    groups, own = score.reshape(inputs // m, m, outputs), jnp.arange(m)[:, None]
    # Each against all of its group: for the few that M is, far less work than a sort.
    lower = sum(
        ((groups[:, i : i + 1] < groups) | ((groups[:, i : i + 1] == groups) & (i < own))).astype(jnp.int32)
        for i in range(m)
    )
    return jnp.asarray(lower >= m - n).reshape(score.shape)


def zeroed(kernel: Float[Array, "in out"], keep: Bool[Array, "in out"]) -> Float[Array, "in out"]:
    """Returns the weights with those that do not stay zero."""
    return jnp.where(keep, kernel, jnp.zeros((), kernel.dtype))
