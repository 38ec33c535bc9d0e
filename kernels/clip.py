"""Ranges of groups, narrowed to where rounding loses least: a few outliers clipped, all others on finer levels."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

SHARES = np.array([1.0, 0.95, 0.9, 0.8, 0.7, 0.6], np.float32)
"""How much of the range each candidate keeps, about its middle; all of it first, which wins a tie."""


def tighten(
    x: Float[Array, "*groups"],
    low: Float[Array, "*groups"],
    high: Float[Array, "*groups"],
    rounded: Callable[[Array, Array], Array],
    member: int,
) -> tuple[Float[Array, "*groups"], Float[Array, "*groups"]]:
    """Returns the ends of every group's range, of all candidates those whose `rounded` is nearest to x.

    `rounded(low, high)` gives x as it is after rounding within these ends; the squared error is summed over the
    `member` axis. One loop, so that the program stays small; it takes a rounding a candidate.
    """
    middle, half = (low + high) / 2, (high - low) / 2

    def attempt(best: tuple[Array, Array], share: Array) -> tuple[tuple[Array, Array], None]:
        error, kept = best
        tried = jnp.sum(jnp.square(rounded(*_ends(low, high, middle, half, share)) - x), member, keepdims=True)
        return (jnp.minimum(error, tried), jnp.where(tried < error, share, kept)), None

    start = jnp.full(low.shape, jnp.inf), jnp.ones(low.shape, jnp.float32)
    (_, share), _ = jax.lax.scan(attempt, start, jnp.asarray(SHARES))
    return _ends(low, high, middle, half, share)


def _ends(low: Array, high: Array, middle: Array, half: Array, share: Array) -> tuple[Array, Array]:
    """Returns the ends of a share of the range; of all of it, exactly its own."""
    whole = share == 1
    return jnp.where(whole, low, middle - half * share), jnp.where(whole, high, middle + half * share)
