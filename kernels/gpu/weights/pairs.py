"""Two of every four weights, put where they belong without a gather: bits become masks, masks choose of two values."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Num

from kernels.gpu.fields import inline

_PAIR = 0x10001
_SIGNS = ("0xAA88", "0xBB99")
"""Selectors of PTX's prmt that repeat the sign of each word's lower byte, and of its upper one."""


def masks(word: Int[Array, "n c"], interpret: bool) -> list[Int[Array, "n c"]]:
    """Returns, for each bit of 16-bit words, words that are all ones where it is set, else 0."""
    if interpret:
        return [-(word >> bit & 1) for bit in range(16)]
    # A shift brings a bit to where a byte has its sign, in both bytes of two words; a permutation repeats signs.
    shifted = [_shifted(word, 7 - bit) for bit in range(8)]
    return [inline(f"prmt.b32 $0, $1, 0, {sign};", [x], jnp.int16, "=r,r", 2) for sign in _SIGNS for x in shifted]


def placed(
    kept: list[Int[Array, "n c"]], first: Num[Array, "n c"], second: Num[Array, "n c"], none: int, interpret: bool
) -> list[Num[Array, "n c"]]:
    """Returns the weights at each of four inputs: `kept` are their masks, `none` the bits of a dropped weight."""
    a, b, c, d = kept

    def of(mask: Array, one: Array, other: Array | int) -> Array:
        return _chosen(mask, one, other, interpret)

    middle = of(a, second, first), of(d, first, second)
    return [of(a, first, none), of(b, middle[0], none), of(c, middle[1], none), of(d, second, none)]


def _chosen(mask: Int[Array, "n c"], one: Num[Array, "n c"], other: Array | int, interpret: bool) -> Num[Array, "n c"]:
    """Returns `one` where the mask is set, else `other`: an array, or a number's bits."""
    if interpret:
        other = other if isinstance(other, int) else _bits(other)
        return jax.lax.bitcast_convert_type(_bits(one) & mask | other & ~mask, one.dtype)
    if isinstance(other, int):
        return inline(f"lop3.b32 $0, $1, $2, {other * _PAIR:#x}, 0xCA;", [mask, one], one.dtype, "=r,r,r", 2)
    return inline("lop3.b32 $0, $1, $2, $3, 0xCA;", [mask, one, other], one.dtype, "=r,r,r,r", 2)


def _shifted(word: Int[Array, "n c"], by: int) -> Int[Array, "n c"]:
    return inline(f"shl.b32 $0, $1, {by};", [word], jnp.int16, "=r,r", 2) if by else word


def _bits(x: Num[Array, "n c"]) -> Int[Array, "n c"]:
    return jax.lax.bitcast_convert_type(x, jnp.int16)
