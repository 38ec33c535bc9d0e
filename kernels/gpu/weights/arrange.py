"""From a canonical matrix to the layout of GPU kernels: once, at load, by array operations alone."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Num

from kernels.gpu.weights.layout import TILE, Arranged, Pairs, Words, unsigned
from kernels.weights.formats import NM, Full, Matrix

ROWS = 64
"""Rows are filled up to a multiple of it: the least that a program for several rows of x takes."""
GROUPS = (64, 128)
BLOCK = 128
"""Inputs of a block where a row has one scale, or none."""
WASTE = 1 / 32
"""The most that long blocks may add to a row; else they are half as long."""


def why_not(matrix: Matrix) -> str | None:
    """Returns why kernels cannot read a matrix, or None."""
    if isinstance(matrix, Arranged):
        return None
    if not isinstance(matrix, Full) and matrix.kind != "2:4":
        return f"it reads dense and 2:4 weights, not {matrix.kind}"
    if matrix.scales is None:
        if isinstance(matrix, Full):
            return "floats without zeros are the plain product's"
        return None if matrix.bits == 16 else f"it reads 2:4 floats of 16 bits, not {matrix.bits}"
    if matrix.group in (*GROUPS, matrix.inputs):
        return None
    return f"{matrix.group} inputs share a scale, not {' or '.join(map(str, GROUPS))} or a whole row"


def arranged(matrix: Matrix) -> Arranged:
    """Returns a matrix as kernels read it. Pure, and can be jitted; it is no part of a product.

    Raises:
        ValueError: no kernel reads such a matrix (says why).
    """
    if reason := why_not(matrix):
        raise ValueError(f"matrix: {reason}")
    if isinstance(matrix, Arranged):
        return matrix
    facts = {"inputs": matrix.inputs, "bits": matrix.bits, "group": matrix.group, "outputs_": matrix.outputs}
    return _pairs(matrix, facts) if isinstance(matrix, NM) else _words(matrix, facts)


def _words(matrix: Matrix, facts: dict[str, Any]) -> Words:
    block = matrix.group if matrix.group in GROUPS else BLOCK
    blocks = _up(-(-matrix.inputs // block), 2)  # a step takes an even number
    held = _filled(unsigned(matrix.values, matrix.bits), blocks * block * matrix.bits // 8)
    words = jax.lax.bitcast_convert_type(held.reshape(held.shape[0], -1, 2), jnp.int16)
    return Words(words, _scales(matrix, blocks), columns=block * matrix.bits // 16, **facts)


def _pairs(matrix: NM, facts: dict[str, Any]) -> Pairs:
    columns = _columns(matrix)
    fours = _up(matrix.inputs // 4, TILE * columns)
    mask = _filled(jnp.unpackbits(matrix.mask, axis=1, bitorder="little"), 4 * fours)
    bits = mask.reshape(mask.shape[0], -1, TILE, columns, 4).swapaxes(2, 3)
    places = jnp.arange(4 * TILE, dtype=jnp.uint16)
    words = jnp.sum(bits.reshape(*bits.shape[:3], -1).astype(jnp.uint16) << places, axis=-1, dtype=jnp.uint16)
    values = _values(matrix, fours, columns)
    mask = jax.lax.bitcast_convert_type(words.reshape(mask.shape[0], -1), jnp.int16)
    return Pairs(values, _scales(matrix, fours // columns), columns=columns, mask=mask, order=matrix.order, **facts)


def _columns(matrix: NM) -> int:
    """Returns the columns of a block: a scale's, or as many as waste little."""
    if matrix.scales is not None and matrix.group in GROUPS:
        return matrix.group // 4
    wasted = -matrix.inputs % (TILE * BLOCK)
    return BLOCK // 4 if wasted <= WASTE * matrix.inputs else BLOCK // 8


def _values(matrix: NM, fours: int, columns: int) -> Array:
    """Returns values as the kernel reads them: floats, or fields of int16 words."""
    held, fields = matrix.values, 1
    if matrix.scales is not None:
        held, fields = unsigned(held, matrix.bits), 16 // matrix.bits
        if matrix.bits == 4:
            held = jnp.stack([held & 15, held >> 4], axis=-1).reshape(held.shape[0], -1)
    held = _filled(held, 2 * fours)
    held = held.reshape(held.shape[0], -1, TILE // fields, fields, columns, 2).swapaxes(4, 5)
    if matrix.scales is not None:
        at = matrix.bits * jnp.arange(fields, dtype=jnp.uint16)[:, None, None]
        words = jnp.sum(held.astype(jnp.uint16) << at, axis=3, dtype=jnp.uint16)
        held = jax.lax.bitcast_convert_type(words, jnp.int16)
    return held.reshape(held.shape[0], -1)


def _scales(matrix: Matrix, blocks: int) -> Array | None:
    if matrix.scales is None:
        return None
    return _filled(matrix.scales, 1 if matrix.group == matrix.inputs else blocks).T


def _filled(x: Num[Array, "r n"], n: int) -> Num[Array, "r2 n2"]:
    """Returns an array cut to n columns or filled up to them, and its rows to whole blocks of rows, with zeros."""
    x = x[:, :n]
    return jnp.pad(x, ((0, -x.shape[0] % ROWS), (0, n - x.shape[1])))


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
