"""Codes packed into 16-bit words: the layout that the decode kernels read.

A plane of width w in {8, 4, 2, 1} holds N = 16 / w codes a word, field i at bit i * w. Along the packed axis, N runs
of `run` neighbouring codes make a block of `run` words: field i of a block's word t is its code i * run + t. So a mask
takes `run` neighbours out of as many words at once. Widths that are no power of two take two planes, the wider one
with the high bits: 6 = 4 + 2 and 3 = 2 + 1.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, UInt8, UInt16

WORD = 16
PLANES: dict[int, tuple[int, ...]] = {8: (8,), 6: (4, 2), 4: (4,), 3: (2, 1), 2: (2,)}
"""The planes of each width of code, high bits first."""
LONGEST_RUN = 64


def fields(width: int) -> int:
    """Returns how many codes of a plane a word holds."""
    return WORD // width


def split(codes: Int[Array, "*b n"], bits: int) -> tuple[UInt16[Array, "*b n"], ...]:
    """Returns the codes' bits plane by plane."""
    parts, left = [], bits
    for width in PLANES[bits]:
        left -= width
        parts.append((codes.astype(jnp.uint16) >> left) & jnp.uint16((1 << width) - 1))
    return tuple(parts)


def join(parts: tuple[Int[Array, "*b n"], ...], bits: int) -> UInt8[Array, "*b n"]:
    """Returns the codes whose planes these are."""
    widths = PLANES[bits]
    left = [sum(widths[i + 1 :]) for i in range(len(widths))]
    shifted = (part.astype(jnp.uint8) << shift for part, shift in zip(parts, left, strict=True))
    return functools.reduce(jnp.bitwise_or, shifted)


def run_of(n: int, bits: int) -> int:
    """Returns the run for n codes: the longest, a power of two up to 64, whose blocks they fill exactly; else 1.

    Both planes of a code take the same, so that a kernel finds the same codes in both. Blocks that are not filled
    exactly end in zeros.
    """
    most = fields(min(PLANES[bits]))
    runs = (1 << i for i in reversed(range(LONGEST_RUN.bit_length())))
    return next((run for run in runs if n % (run * most) == 0), 1)


def count(n: int, width: int) -> int:
    """Returns how many words n codes of a plane take."""
    return -(-n // fields(width))


def pack(codes: Int[Array, "*b n"], width: int, run: int) -> UInt16[Array, "*b m"]:
    """Returns the words of one plane, packed along the last axis; the last block is filled up with zeros."""
    block = fields(width) * run
    n = codes.shape[-1]
    filled = jnp.pad(codes.astype(jnp.uint16), [*[(0, 0)] * (codes.ndim - 1), (0, -n % block)])
    lanes = filled.reshape(*codes.shape[:-1], -1, fields(width), run)
    words = jnp.sum(lanes << _shifts(width), axis=-2, dtype=jnp.uint16)
    return words.reshape(*codes.shape[:-1], -1)


def unpack(words: UInt16[Array, "*b m"], width: int, run: int, n: int) -> UInt16[Array, "*b n"]:
    """Returns the first n codes that `pack` packed."""
    blocks = words.reshape(*words.shape[:-1], -1, 1, run)
    lanes = (blocks >> _shifts(width)) & jnp.uint16((1 << width) - 1)
    return lanes.reshape(*words.shape[:-1], -1)[..., :n]


def place(at: Int[Array, "*b"], width: int, run: int) -> tuple[Int[Array, "*b"], UInt16[Array, "*b"]]:
    """Returns the word in which the code at this index lies, and the bit at which its field begins."""
    block, inside = at // (fields(width) * run), at % (fields(width) * run)
    return block * run + inside % run, (inside // run * width).astype(jnp.uint16)


def get(plane: UInt16[Array, "b h d m"], at: Int[Array, "b n"], width: int, run: int) -> UInt16[Array, "b h d n"]:
    """Returns row b's codes at these indices along the last axis."""
    picked = jax.vmap(lambda row, word, bit: jnp.take(row, word, axis=-1, mode="clip") >> bit)
    return picked(plane, *place(at, width, run)) & jnp.uint16((1 << width) - 1)


def put(
    plane: UInt16[Array, "b h d m"],
    codes: UInt16[Array, "b h d n"],
    at: Int[Array, "b n"],
    width: int,
    run: int,
    capacity: int,
) -> UInt16[Array, "b h d m"]:
    """Returns the plane with row b's codes at these indices along the last axis; from `capacity` on they are dropped.

    Adds the differences from what is there: several codes may share a word, and in sums their fields do not meet.
    """
    word, bit = place(at, width, run)
    word = jnp.where(at < capacity, word, plane.shape[-1])
    mask = jnp.uint16((1 << width) - 1)

    def one_row(row: Array, new: Array, word: Array, bit: Array) -> Array:
        old = (jnp.take(row, word, axis=-1, mode="clip") >> bit) & mask
        return row.at[..., word].add((new - old) << bit, mode="drop")

    return jax.vmap(one_row)(plane, codes, word, bit)


def _shifts(width: int) -> UInt16[Array, "fields 1"]:
    return (jnp.arange(fields(width), dtype=jnp.uint16) * width)[:, None]
