"""Codes as numbers without a conversion: the bits of a small whole number are a subnormal float16, 2^-24 times it.

A mask takes field i out of a 16-bit word, or out of the word shifted by a byte, where it lies at bit pos = i * width
mod 8. Matrix units take subnormal numbers as they are; what a field is multiplied with is scaled by 2^-pos, and their
products, in float32, by 2^24.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, DTypeLike, Float, Int

from kernels import words

WHOLE = 2.0**24
"""What makes a field's number, at bit 0, its code."""
LIFT = 128.0
"""What softmax's weights are multiplied with before they are rounded to float16, and divided by at the end.

Where one token outweighs all others, these would vanish below float16's numbers. A group's span times this must be one.
"""
_PAIR = 0x10001
HIGH_BYTES = 0x4341
"""PTX's selector of bytes (prmt) for the upper byte of each of two words, before zeros."""


class Field(NamedTuple):
    """One field of one plane's words: codes / levels = the sum over planes of its number * `WHOLE` * `factor`.

    `unit` is the factor of a field at bit 0.
    """

    plane: int
    index: int
    width: int
    unit: float

    @property
    def factor(self) -> float:
        return self.unit * 0.5**self.place

    @property
    def place(self) -> int:
        """At which bit of its byte it begins."""
        return self.index * self.width % 8

    @property
    def low(self) -> bool:
        """Whether it lies in the lower byte."""
        return self.index * self.width < 8

    @property
    def mask(self) -> int:
        return ((1 << self.width) - 1) << self.place


def fields(bits: int) -> list[list[Field]]:
    """Returns, plane by plane, the fields of codes of this width."""
    left, found = bits, []
    for plane, width in enumerate(words.PLANES[bits]):
        left -= width
        unit = 2.0**left / (2**bits - 1)
        found.append([Field(plane, i, width, unit) for i in range(words.fields(width))])
    return found


def numbers(word: Int[Array, "n m"], shifted: Int[Array, "n m"], field: Field, interpret: bool) -> Float[Array, "n m"]:
    """Returns code * 2^(pos - 24) of one field of int16 words; `shifted` are the words a byte further."""
    source = word if field.low else shifted
    if interpret:
        return jax.lax.bitcast_convert_type(source & field.mask, jnp.float16)
    # One instruction for two words. The compiler itself would take words apart first.
    if field.width == 8 and not field.low:
        return inline(f"prmt.b32 $0, $1, 0, {HIGH_BYTES:#x};", [word], jnp.float16, "=r,r", 2)
    return inline(f"and.b32 $0, $1, {field.mask * _PAIR:#x};", [source], jnp.float16, "=r,r", 2)


def a_byte_further(word: Int[Array, "n m"], interpret: bool) -> Int[Array, "n m"]:
    """Returns words whose lower byte is the upper one of these; the upper one is whatever comes along."""
    return word >> 8 if interpret else inline("shr.b32 $0, $1, 8;", [word], jnp.int16, "=r,r", 2)


def further(word: Int[Array, "n m"], bits: Int[Array, ""], interpret: bool) -> Int[Array, "n m"]:
    """Returns words shifted down by up to 12 bits; what comes in at the upper end is no field's."""
    each = jnp.broadcast_to(bits.astype(jnp.int16), word.shape)
    if interpret:
        return word >> each
    asm = "{ .reg .b32 n; and.b32 n, $2, 255; shr.b32 $0, $1, n; }"
    return inline(asm, [word, each], jnp.int16, "=r,r,r", 2)


def metadata(x: Array) -> Float[Array, "*any"]:
    """Returns spans or zeros over `unit` in float32, from float16 or from the bits of float8 (e4m3)."""
    if x.dtype == jnp.float16:
        return x.astype(jnp.float32)
    # Sign, four bits of exponent, three of mantissa: a shift keeps the sign and leaves its copy before the exponent.
    half = (x.astype(jnp.int16) << 8 >> 1) & -0x4001
    return jax.lax.bitcast_convert_type(half, jnp.float16).astype(jnp.float32)


def unit(meta: Array) -> float:
    """Returns what `metadata` leaves out: float8's exponent counts from 7, float16's from 15."""
    return 1.0 if meta.dtype == jnp.float16 else 256.0


def exp2(x: Float[Array, "*any"], interpret: bool) -> Float[Array, "*any"]:
    """Returns 2^x in one instruction: x is not above 0, and what it gives below the normal numbers may as well be 0."""
    if interpret or not x.ndim:
        return jnp.exp2(x)
    return inline("ex2.approx.ftz.f32 $0, $1;", [x], jnp.float32, "=f,f", 1)


def inline(asm: str, args: list[Array], dtype: DTypeLike, constraints: str, pack: int) -> Array:
    """Returns what PTX makes of arrays' elements, `pack` of them at a time."""
    out = [jax.ShapeDtypeStruct(args[0].shape, dtype)]
    return plgpu.elementwise_inline_asm(asm, args=args, constraints=constraints, pack=pack, result_shape_dtypes=out)[0]
