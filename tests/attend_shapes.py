"""Shapes of a decode kernel's call, to compile it without arrays."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kernels import words
from kernels.gpu.settled import Codes, Part, Tail

TOKENS, HEADS, CHANNELS = 4096, 8, 128


def variant(
    partials: Callable[..., Any], key_bits: int, value_bits: int, group: int, rows: int
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Returns a kernel's call as `sass` compiles it: a function of arrays alone, and their shapes."""
    shape = jax.ShapeDtypeStruct
    keys, values = codes("keys", key_bits, group), codes("values", value_bits, group)
    bare = [side._replace(planes=(), span=None, zero=None) for side in (keys, values)]
    row = shape((1, HEADS, 32, CHANNELS), jnp.float16)
    arguments = (
        queries(rows),
        shape((1,), jnp.int32),
        tuple((side.planes, side.span, side.zero) for side in (keys, values)),
        (row, row, shape((1, 1, 32), jnp.float32)),
    )
    return functools.partial(_attend, partials, *bare), arguments


def queries(rows: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, HEADS, rows, CHANNELS), jnp.float32)


def codes(side: str, bits: int, group: int) -> Codes:
    """Returns one side's shapes, metadata in float8."""
    shape = jax.ShapeDtypeStruct
    if bits == 16:
        return Codes((shape((1, HEADS, TOKENS, CHANNELS), jnp.bfloat16),), None, None, 16)
    outer, packed = (TOKENS, CHANNELS) if side == "keys" else (CHANNELS, TOKENS)
    planes = tuple(shape((1, HEADS, outer, words.count(packed, width)), jnp.uint16) for width in words.PLANES[bits])
    meta = (TOKENS // group, CHANNELS) if side == "keys" else (CHANNELS // group, TOKENS)
    span = shape((1, HEADS, *meta), jnp.uint8)
    return Codes(planes, span, span, bits, group, words.run_of(TOKENS, bits))


def _attend(partials: Callable[..., Any], keys: Codes, values: Codes, q: Any, counts: Any, arrays: Any, tail: Any):
    sides = (
        side._replace(planes=planes, span=span, zero=zero)
        for side, (planes, span, zero) in zip((keys, values), arrays, strict=True)
    )
    return partials(q, Part(*sides, counts), Tail(*tail), 0.1275, splits=4)
