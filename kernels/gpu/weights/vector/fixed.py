"""A row of activations in fixed point: 16 bits of its largest number, as two bytes that integer products take.

An input is `scale` * (256 * high + low), with a high byte from -128 and a low one from 0 on. Of each, at most 2^-15 of
the largest is lost (of a largest below 2^-100, all). Of results it is 2^-15 / sqrt(3) times the largest over the root
of the mean square: less than rounding to bfloat16 takes, unless one input outweighs thousands of others.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from kernels.gpu.instructions import paired

_TOP = 2.0**14
"""What the largest power of two of a row becomes."""
_MOST = 2.0**15 - 1
"""The largest whole number of 16 bits."""
_ROUNDS = 1.5 * 2.0**23
"""What is added to it is rounded to a whole number, which its lower bits are."""
_LEAST = 27 << 23
"""The bits of 2^-100."""


class Bytes(NamedTuple):
    """High and low bytes of inputs: two of each in 16 bits, or four in 32."""

    high: Int[Array, "n"]
    low: Int[Array, "n"]


def power(x: Sequence[Float[Array, "n"]]) -> Float[Array, ""]:
    """Returns the power of two at or below a row's largest absolute value.

    It is 2^-100 at least, and infinity if an input is infinite or NaN.
    """
    # By bits, whose order is that of the numbers: a GPU's maximum of floats would pass over what is no number.
    first, *others = (jax.lax.bitcast_convert_type(part, jnp.int32) & 0x7FFFFFFF for part in x)
    largest = jnp.max(functools.reduce(jnp.maximum, others, first))
    exponent = jnp.maximum(largest, _LEAST) & 0x7F800000
    return jax.lax.bitcast_convert_type(exponent, jnp.float32)


def scale(power: Float[Array, ""]) -> Float[Array, ""]:
    """Returns what a whole number of fixed point is worth."""
    return power * (1 / _TOP)


def load(x_ref: Any, at: Int[Array, "n"]) -> Float[Array, "n"]:
    """Returns inputs of a row in float32; 0 past its end."""
    return plgpu.load(x_ref.at[at], mask=at < x_ref.shape[0], other=jnp.zeros((), x_ref.dtype)).astype(jnp.float32)


def whole(x: Float[Array, "n"], power: Float[Array, ""]) -> Int[Array, "n"]:
    """Returns inputs in fixed point, in the lower 16 bits."""
    # float32 has numbers that would be rounded up to the next power of two, for which there is no room.
    return jax.lax.bitcast_convert_type(jnp.minimum(x * (_TOP / power), _MOST) + _ROUNDS, jnp.int32)


def bytes_of(x: list[Int[Array, "n"]], interpret: bool) -> Bytes:
    """Returns the bytes of inputs: of two arrays, 16 bits for each two of them; of four, 32 bits for each four."""
    body, dtype = (_of_two, jnp.int16) if len(x) == 2 else (_of_four, jnp.int32)
    return Bytes(*paired(body, x, dtype, 2, interpret))


# Each result is its own element's alone, whichever two a GPU pairs.
def _of_two(m: Any, a: Any, a2: Any, b: Any, b2: Any) -> tuple[Any, Any]:
    return _split(m, a, b, a2, b2)


def _of_four(m: Any, a: Any, a2: Any, b: Any, b2: Any, c: Any, c2: Any, d: Any, d2: Any) -> tuple[Any, ...]:
    (high, low), (high2, low2) = _split(m, a, b, c, d), _split(m, a2, b2, c2, d2)
    return high, high2, low, low2


def _split(m: Any, a: Any, b: Any, c: Any, d: Any) -> tuple[Any, Any]:
    """Returns the high and the low bytes of four inputs."""
    ab, cd = m.choose(a, b, 0x5140), m.choose(c, d, 0x5140)
    return m.choose(ab, cd, 0x7632), m.choose(ab, cd, 0x5410)
