"""The lowest scores of a matrix or of each of its columns, exactly so many, without sorting."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int


def lowest(score: Float[Array, "in out"], count: int | Int[Array, ""], over: str = "matrix") -> Bool[Array, "in out"]:
    """Returns which are the `count` lowest scores of the matrix, or of every "output"; of equal ones the first.

    As a stable sort would say, but found bit by bit: on a CPU more than ten times as fast. No score may be negative.
    """
    outputs = score.shape[1]
    bits = lax.bitcast_convert_type(score.astype(jnp.float32), jnp.int32)
    limit = _largest(lambda bound: _count(bits < bound, over) < count, over, outputs)
    below, equal = bits < limit, bits == limit
    left = count - _count(below, over)

    def first() -> Bool[Array, "in out"]:
        place = jnp.arange(score.size, dtype=jnp.int32).reshape(score.shape)
        return equal & (place < _largest(lambda end: _count(equal & (place < end), over) <= left, over, outputs))

    return below | lax.cond((_count(equal, over) == left).all(), lambda: equal, first)


def _largest(holds: Callable[[Int[Array, "1 n"]], Bool[Array, "1 n"]], over: str, outputs: int) -> Int[Array, "1 n"]:
    """Returns the largest number of 31 bits for which it holds, as it does for all below: one, or one an output."""

    def bit(index: Int[Array, ""], found: Int[Array, "1 n"]) -> Int[Array, "1 n"]:
        higher = found | (1 << (30 - index))
        return jnp.where(holds(higher), higher, found)

    return lax.fori_loop(0, 31, bit, jnp.zeros((1, outputs if over == "output" else 1), jnp.int32))


def _count(mask: Bool[Array, "in out"], over: str) -> Int[Array, "1 n"]:
    """Returns how many are true, in all or an output. As floats, exact up to 2^24 a row: XLA on CPUs is faster so."""
    sums = jnp.sum(mask, axis=0 if over == "output" else 1, dtype=jnp.float32).astype(jnp.int32)
    return sums[None] if over == "output" else jnp.sum(sums)[None, None]
