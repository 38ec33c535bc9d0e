"""Codes as numbers without a conversion: a field or-ed into the float16 1024 is 1024 + code * 2^pos.

A mask takes field i out of a 16-bit word, or out of the word shifted by a byte, where it lies at bit pos = i * width
mod 8. What it is multiplied with is scaled by 2^-pos, and 1024 times the sum of that is subtracted at the end.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, DTypeLike, Float, Int

from kernels import words

BIAS = 1024.0
LIFT = 128.0
"""What softmax's weights are multiplied with before they are rounded to float16, and divided by at the end.

Where one token outweighs all others, these would vanish below float16's numbers. A group's span times this must be one.
"""
_HALF_1024 = 0x6400
_PAIR = 0x10001


class Field(NamedTuple):
    """One field of one plane's words: codes / levels = the sum over planes of (its number - 1024) * `factor`.

    Of a `centred` number, `centre` is what was taken from it besides 1024.
    """

    plane: int
    index: int
    width: int
    factor: float

    @property
    def low(self) -> bool:
        """Whether it lies in the lower byte."""
        return self.index * self.width < 8

    @property
    def mask(self) -> int:
        return ((1 << self.width) - 1) << self.index * self.width % 8

    @property
    def centre(self) -> float:
        """The middle of its codes, times 2^pos."""
        return 2.0 ** (self.width - 1 + self.index * self.width % 8)


def fields(bits: int) -> list[list[Field]]:
    """Returns, plane by plane, the fields of codes of this width."""
    left, found = bits, []
    for plane, width in enumerate(words.PLANES[bits]):
        left -= width
        unit = 2.0**left / (2**bits - 1)
        found.append([Field(plane, i, width, unit * 0.5 ** (i * width % 8)) for i in range(words.fields(width))])
    return found


def numbers(word: Int[Array, "n m"], shifted: Int[Array, "n m"], field: Field, interpret: bool) -> Float[Array, "n m"]:
    """Returns 1024 + code * 2^pos of one field of int16 words; `shifted` are the words a byte further."""
    source = word if field.low else shifted
    if interpret:
        return jax.lax.bitcast_convert_type((source & field.mask) | _HALF_1024, jnp.float16)
    # One instruction for two words. The compiler itself would take words apart first.
    asm = f"lop3.b32 $0, $1, {field.mask * _PAIR:#x}, {_HALF_1024 * _PAIR:#x}, 0xEA;"
    return inline(asm, [source], jnp.float16, "=r,r", 2)


def centred(word: Int[Array, "n m"], shifted: Int[Array, "n m"], field: Field, interpret: bool) -> Float[Array, "n m"]:
    """Returns the numbers of `numbers` less 1024 and the field's centre: exact, and half of them below 0.

    For long sums: matrix units cut off what is far below the largest addend, and 1024 times the sum of thousands of
    weights swallowed three hundredths of what was left without it (4 bits, measured on an H100).
    """
    if interpret:
        return numbers(word, shifted, field, interpret) - jnp.float16(BIAS + field.centre)
    source = word if field.low else shifted
    less = int(np.float16(-BIAS - field.centre).view(np.uint16)) * _PAIR
    asm = (
        "{ .reg .b32 n, c; "
        f"lop3.b32 n, $1, {field.mask * _PAIR:#x}, {_HALF_1024 * _PAIR:#x}, 0xEA; mov.b32 c, {less:#x}; "
        "add.rn.f16x2 $0, n, c; }"
    )
    return inline(asm, [source], jnp.float16, "=r,r", 2)


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
