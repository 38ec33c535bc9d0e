"""Rounding to codes inside of a Triton kernel: `quantize.encode` on even levels, of what Pallas has there."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kernels import metadata
from kernels.clip import SHARES
from kernels.gpu.fields import inline
from kernels.metadata import Metadata

_UNIT = 256.0  # float16's number of float8's bits, times this, is float8's


@dataclasses.dataclass(frozen=True)
class Rounding:
    """Groups to codes, spans and zeros. There is no table, no scan, no rounding and, before Ada, no float8 to use."""

    bits: int
    kind: Metadata
    clip: bool
    interpret: bool

    def encode(self, x: Float[Array, "*groups"], member: int) -> tuple[Array, Array, Array]:
        """Returns codes as integers, and spans and zeros as they are stored."""
        low, high = jnp.min(x, member, keepdims=True), jnp.max(x, member, keepdims=True)
        if self.clip:
            low, high = self._tighten(x, low, high, member)
        codes, span, zero, _ = self._round(x, low, high)
        return codes.astype(jnp.int32), self.stored(span), self.stored(zero)

    def _tighten(self, x: Array, low: Array, high: Array, member: int) -> tuple[Array, Array]:
        """Returns `clip.tighten`'s ends: of all shares of the ranges, those whose squared error is the least."""
        middle, half = (low + high) / 2, (high - low) / 2

        def ends(share: Array) -> tuple[Array, Array]:
            whole = share == 1
            return jnp.where(whole, low, middle - half * share), jnp.where(whole, high, middle + half * share)

        def attempt(i: Int[Array, ""], best: tuple[Array, Array]) -> tuple[Array, Array]:
            least, kept = best
            share = functools.reduce(lambda x, k: jnp.where(i == k, SHARES[k], x), range(len(SHARES)), SHARES[0])
            codes, _, zero, step = self._round(x, *ends(jnp.full(low.shape, share)))
            error = jnp.sum(jnp.square(codes * step + zero - x), member, keepdims=True)
            return jnp.minimum(least, error), jnp.where(error < least, share, kept)

        start = jnp.full(low.shape, jnp.inf), jnp.ones(low.shape, jnp.float32)
        return ends(jax.lax.fori_loop(0, len(SHARES), attempt, start)[1])

    def _round(self, x: Array, low: Array, high: Array) -> tuple[Array, Array, Array, Array]:
        """Returns codes on even levels, and what they share: spans, zeros, and the steps between levels."""
        levels = 2**self.bits - 1
        zero = self.at_most(low)
        span = 0 - self.at_most(zero - high)  # of a constant group 0: a minus would make that -0
        step = span * float(np.float32(1 / levels))
        codes = _nearest((x - zero) * _inverse(jnp.where(step == 0, 1, step), self.interpret), self.interpret)
        return jnp.clip(codes, 0, levels), span, zero, step

    def at_most(self, x: Float[Array, "*any"]) -> Float[Array, "*any"]:
        """Returns `metadata.at_most` in float32.

        The bits of float8 are float16's without the last 7, and 2^8 times as much: exponents count from 7, not from 15.
        """
        lost, unit = (0, 1.0) if self.kind == "float16" else (0x7F, _UNIT)
        limit = float(jnp.finfo(metadata.DTYPES[self.kind]).max)
        x = jnp.clip(x, -limit, limit) * (1 / unit)
        half = x.astype(jnp.float16)
        bits = jax.lax.bitcast_convert_type(half, jnp.int16).astype(jnp.int32)
        # Of numbers below 0, more bits are less.
        bits += jnp.where(half.astype(jnp.float32) > x, jnp.where(bits < 0, 1, -1), 0)
        bits = (bits + jnp.where(bits < 0, lost, 0)) & ~lost
        return jax.lax.bitcast_convert_type(bits.astype(jnp.int16), jnp.float16).astype(jnp.float32) * unit

    def stored(self, x: Float[Array, "*any"]) -> Array:
        """Returns numbers of the metadata's kind, in float32, as they are stored: as float16, or float8's bits."""
        if self.kind == "float16":
            return x.astype(jnp.float16)
        bits = jax.lax.bitcast_convert_type((x * (1 / _UNIT)).astype(jnp.float16), jnp.int16)
        return ((bits >> 7 & 0x7F) | (bits >> 8 & 0x80)).astype(jnp.uint8)


def _nearest(x: Float[Array, "*any"], interpret: bool) -> Float[Array, "*any"]:
    """Returns the nearest integers, in float32, ties to even: no primitive of Triton's."""
    return jnp.round(x) if interpret else inline("cvt.rni.f32.f32 $0, $1;", [x], jnp.float32, "=f,f", 1)


def _inverse(x: Float[Array, "*any"], interpret: bool) -> Float[Array, "*any"]:
    """Returns 1 / x in float32, rounded as elsewhere: Triton's own division may be two units off."""
    return 1 / x if interpret else inline("rcp.rn.f32 $0, $1;", [x], jnp.float32, "=f,f", 1)
