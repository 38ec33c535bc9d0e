"""Group-wise asymmetric rounding, in plain jnp.

A group of values shares a `zero` (at most its minimum) and a `span` (at least up to its maximum), in few bits; a value
x becomes the code whose level comes nearest to (x - zero) / span. Levels are evenly spaced in [0, 1], or a codebook's.
Laws, with even levels, no clipping and values within the metadata's range: |x - decode(encode(x))| is at most
span / (2 * (2^bits - 1)); a constant group that its metadata can hold has span 0 and is exact.
Source: KIVI, arXiv:2402.02750, section 3; rounding the metadata outwards is ours, so that no code is clipped.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kernels import clip, codebook, metadata
from kernels.metadata import Metadata

Axis = Literal["tokens", "channels"]
"""What a group runs along: `tokens` (one scale a channel, as for keys) or `channels` (one a token, as for values)."""
Codebook = Literal["uniform", "normal"]

PACKED_BITS = (8, 6, 4, 3, 2)

# From a table, because XLA divides by a constant otherwise than by a traced number, and one float32 ulp can
# move a code: with it, static and traced bits give the same codes.
_INVERSE_LEVELS = np.array([0, *(1 / (2**bits - 1) for bits in range(1, 17))], np.float32)


@dataclasses.dataclass(frozen=True)
class Quantizer:
    """How values are rounded, but for the number of bits: groups of `group` along `axis`, and the options."""

    axis: Axis
    group: int
    clip: bool = False
    codebook: Codebook = "uniform"
    metadata: Metadata = "float16"

    @property
    def step(self) -> int:
        """How many tokens are quantized together: a group's along tokens, else one."""
        return self.group if self.axis == "tokens" else 1

    @property
    def member(self) -> int:
        """The axis on which `split` puts the members of a group."""
        return -2 if self.axis == "tokens" else -1

    def split(self, x: Float[Array, "b h n d"]) -> Float[Array, "b h n2 g d2"]:
        """Returns x with its groups as an axis of their own: (b, h, n/g, g, d) or (b, h, n, d/g, g)."""
        b, h, n, d = x.shape
        if self.axis == "tokens":
            return x.reshape(b, h, n // self.group, self.group, d)
        return x.reshape(b, h, n, d // self.group, self.group)


class Encoded(NamedTuple):
    """Codes as floats, in groups, with the group's span and zero (group axis kept, of length 1)."""

    codes: Float[Array, "*groups"]
    span: Float[Array, "*groups"]
    zero: Float[Array, "*groups"]


def encode(grouped: Float[Array, "*groups"], bits: int | Int[Array, ""], quantizer: Quantizer) -> Encoded:
    """Returns the codes of values in groups; `bits` may be traced, then one program serves every width."""
    x, member = grouped.astype(jnp.float32), quantizer.member
    low, high = x.min(member, keepdims=True), x.max(member, keepdims=True)

    def within(low: Array, high: Array) -> Encoded:
        return _even(x, low, high, bits, quantizer.metadata)

    if quantizer.clip:
        low, high = clip.tighten(x, low, high, lambda *ends: _evenly(within(*ends), bits), member)
    if quantizer.codebook == "uniform":
        return within(low, high)
    parts = zip(_normal(x, bits, quantizer), within(low, high), strict=True)
    return Encoded(*(jnp.where(codebook.serves(bits), normal, even) for normal, even in parts))


def decode(encoded: Encoded, bits: int | Int[Array, ""], quantizer: Quantizer) -> Float[Array, "*groups"]:
    """Returns the values that the codes stand for, in float32."""
    even = _evenly(encoded, bits)
    if quantizer.codebook == "uniform":
        return even
    normal = codebook.levels(encoded.codes, bits) * _float(encoded.span) + _float(encoded.zero)
    return jnp.where(codebook.serves(bits), normal, even)


def round_groups(x: Float[Array, "b h n d"], bits: int | Int[Array, ""], quantizer: Quantizer) -> Array:
    """Returns x as a store of this width would give it back, in float32; 16 bits leave it alone."""
    rounded = decode(encode(quantizer.split(x), bits, quantizer), bits, quantizer).reshape(x.shape)
    return jnp.where(jnp.asarray(bits) >= 16, x.astype(jnp.float32), rounded)


def _even(x: Array, low: Array, high: Array, bits: int | Array, kind: Metadata) -> Encoded:
    """Returns the codes on even levels from low to high."""
    zero = metadata.at_most(low, kind)
    span = metadata.at_least(high - _float(zero), kind)
    step = _float(span) * jnp.asarray(_INVERSE_LEVELS)[bits]
    levels = ((1 << jnp.asarray(bits, jnp.int32)) - 1).astype(jnp.float32)
    # Not a quotient: compilers may make this product of it, and which of two equally near codes is taken hangs on that.
    codes = jnp.round((x - _float(zero)) * (1 / jnp.where(step == 0, 1, step)))
    return Encoded(jnp.clip(codes, 0, levels), span, zero)


def _evenly(encoded: Encoded, bits: int | Array) -> Array:
    """Returns the values of codes on even levels."""
    step = _float(encoded.span) * jnp.asarray(_INVERSE_LEVELS)[bits]
    return encoded.codes * step + _float(encoded.zero)


def _normal(x: Array, bits: int | Array, quantizer: Quantizer) -> Encoded:
    """Returns the codes on the normal distribution's levels; the mean is the zero, the deviation the span."""
    kind, member = quantizer.metadata, quantizer.member
    zero = metadata.nearest(x.mean(member, keepdims=True), kind)
    # About the mean as it is stored: what rounding it lost is made up for by a wider span.
    span = metadata.nearest(jnp.sqrt(jnp.mean(jnp.square(x - _float(zero)), member, keepdims=True)), kind)
    unit = (x - _float(zero)) / jnp.where(span == 0, 1, _float(span))
    return Encoded(codebook.codes(unit, bits), span, zero)


def _float(x: Array) -> Float[Array, "*any"]:
    return x.astype(jnp.float32)
