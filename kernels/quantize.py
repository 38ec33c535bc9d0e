"""Group-wise asymmetric rounding and bit packing, in plain jnp.

A group of values shares a float16 `zero` (at most its minimum) and `scale`; a value x becomes the code
round((x - zero) / scale) in [0, 2^bits - 1]. Laws: |x - decode(encode(x))| <= scale / 2; a constant group that
float16 can hold has scale 0 and is exact; unpack(pack(codes)) is the identity.
Source: KIVI, arXiv:2402.02750, section 3; rounding the metadata outwards is ours, so that no code is clipped.
"""

from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float16, Int, UInt8

Axis = Literal["tokens", "channels"]
"""What a group runs along: `tokens` for keys (one scale a channel), `channels` for values (one a token)."""

PACKED_BITS = (8, 4, 2)

# From a table, because XLA divides by a constant otherwise than by a traced number, and one float32 ulp can
# move a float16 scale: with it, static and traced bits give the same codes.
_INVERSE_LEVELS = np.array([0, *(1 / (2**bits - 1) for bits in range(1, 17))], np.float32)


class Encoded(NamedTuple):
    """Codes as floats, in groups, with the group's scale and zero (group axis kept, of length 1)."""

    codes: Float[Array, "*groups"]
    scale: Float16[Array, "*groups"]
    zero: Float16[Array, "*groups"]


def split_groups(x: Float[Array, "b h n d"], group: int, axis: Axis) -> Float[Array, "b h n2 g d2"]:
    """Returns x with its groups as an axis of their own: (b, h, n/g, g, d) or (b, h, n, d/g, g)."""
    b, h, n, d = x.shape
    return x.reshape(b, h, n // group, group, d) if axis == "tokens" else x.reshape(b, h, n, d // group, group)


def group_axis(axis: Axis) -> int:
    """Returns where `split_groups` puts the members of a group."""
    return -2 if axis == "tokens" else -1


def encode(grouped: Float[Array, "*groups"], bits: int | Int[Array, ""], axis: Axis) -> Encoded:
    """Returns the codes of values in groups; `bits` may be traced, then one program serves every width."""
    member = group_axis(axis)
    x = grouped.astype(jnp.float32)
    levels = ((1 << jnp.asarray(bits, jnp.int32)) - 1).astype(jnp.float32)
    inverse = jnp.asarray(_INVERSE_LEVELS)[bits]
    low, high = x.min(member, keepdims=True), x.max(member, keepdims=True)
    zero = _to_half(low, -jnp.inf)
    scale = _to_half((high - zero.astype(jnp.float32)) * inverse, jnp.inf)
    step = scale.astype(jnp.float32)
    codes = jnp.round((x - zero.astype(jnp.float32)) / jnp.where(step == 0, 1, step))
    return Encoded(jnp.clip(codes, 0, levels), scale, zero)


def decode(encoded: Encoded) -> Float[Array, "*groups"]:
    """Returns the values that the codes stand for, in float32."""
    return encoded.codes * encoded.scale.astype(jnp.float32) + encoded.zero.astype(jnp.float32)


def round_groups(x: Float[Array, "b h n d"], bits: int | Int[Array, ""], group: int, axis: Axis) -> Array:
    """Returns x as a store of this width would give it back, in float32; 16 bits leave it alone."""
    rounded = decode(encode(split_groups(x, group, axis), bits, axis)).reshape(x.shape)
    return jnp.where(jnp.asarray(bits) >= 16, x.astype(jnp.float32), rounded)


def pack(codes: Float[Array, "*batch d"], bits: int) -> UInt8[Array, "*batch words"]:
    """Returns 8/bits codes a byte along the last axis; field i of byte w is code i * words + w.

    Taking each field from its own contiguous run, not from neighbours, makes unpacking a concatenation.
    """
    fields = 8 // bits
    planes = codes.astype(jnp.uint8).reshape(*codes.shape[:-1], fields, codes.shape[-1] // fields)
    shifts = (jnp.arange(fields, dtype=jnp.uint8) * bits)[:, None]
    return jnp.sum(planes << shifts, axis=-2, dtype=jnp.uint8)


def unpack(words: UInt8[Array, "*batch words"], bits: int) -> UInt8[Array, "*batch d"]:
    """Returns the codes that `pack` packed."""
    fields = 8 // bits
    shifts = (jnp.arange(fields, dtype=jnp.uint8) * bits)[:, None]
    planes = (words[..., None, :] >> shifts) & jnp.uint8((1 << bits) - 1)
    return planes.reshape(*words.shape[:-1], -1)


def _to_half(x: Float[Array, "*any"], towards: float) -> Float16[Array, "*any"]:
    """Returns the nearest float16 that does not lie on the wrong side of x."""
    half = x.astype(jnp.float16)
    wrong = half.astype(jnp.float32) > x if towards < 0 else half.astype(jnp.float32) < x
    return jnp.where(wrong, jnp.nextafter(half, jnp.float16(towards)), half)
