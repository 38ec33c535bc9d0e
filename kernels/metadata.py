"""What a group of codes shares, in float16 or float8 (e4m3), rounded outwards so that no code is clipped."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float

Metadata = Literal["float16", "float8"]
DTYPES = {"float16": jnp.float16, "float8": jnp.float8_e4m3fn}
_BITS = {jnp.float16: jnp.uint16, jnp.float8_e4m3fn: jnp.uint8}


def nearest(x: Float[Array, "*any"], metadata: Metadata) -> Float[Array, "*any"]:
    """Returns the nearest number of this kind; beyond its range, the end of the range."""
    return _nearest(x, DTYPES[metadata]).astype(DTYPES[metadata])


def at_most(x: Float[Array, "*any"], metadata: Metadata) -> Float[Array, "*any"]:
    """Returns the largest number of this kind that is not above x; beyond its range, the end of the range."""
    near = _nearest(x, DTYPES[metadata])
    kind = near.astype(DTYPES[metadata])
    return jnp.where(near > x, _below(kind), kind)


def at_least(x: Float[Array, "*any"], metadata: Metadata) -> Float[Array, "*any"]:
    """Returns the smallest number of this kind that is not below x; beyond its range, the end of the range."""
    return -at_most(-x, metadata)


def _nearest(x: Float[Array, "*any"], kind: DTypeLike) -> Float[Array, "*any"]:
    """Returns the nearest number of a kind in float32.

    Not by a conversion there and back: on a GPU XLA leaves such a pair out, and then no number was seen to be above x.
    """
    facts = jnp.finfo(kind)
    x = jnp.clip(x.astype(jnp.float32), -float(facts.max), float(facts.max))
    normal, unit = float(facts.smallest_normal), float(facts.smallest_subnormal)
    rounded = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=facts.nmant)
    return jnp.where(jnp.abs(x) < normal, jnp.round(x / unit) * unit, rounded)


def _below(x: Float[Array, "*any"]) -> Float[Array, "*any"]:
    """Returns the next number below. In sign and magnitude: one down from a positive, one up from a negative."""
    word = _BITS[x.dtype.type]
    bits = jax.lax.bitcast_convert_type(x, word)
    sign = jnp.asarray(1 << (8 * bits.dtype.itemsize - 1), word)
    down = jnp.where(bits < sign, bits - 1, bits + 1)
    smallest_negative = sign + 1
    zero = (bits == 0) | (bits == sign)
    lowest = jax.lax.bitcast_convert_type(jnp.asarray(-float(jnp.finfo(x.dtype).max), x.dtype), word)
    stepped = jnp.where(zero, smallest_negative, jnp.where(bits == lowest, bits, down))
    return jax.lax.bitcast_convert_type(stepped.astype(word), x.dtype)
