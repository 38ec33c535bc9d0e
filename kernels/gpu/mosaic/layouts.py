"""Layouts of arrays in a warpgroup's registers, and how arrays are spread, joined and cut in them."""

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from kernels.gpu.mosaic.plan import COLUMNS, LANES, TILE

MATRIX: Any = plgpu.Layout.WGMMA
ROWS, COLS = MATRIX.reduce(1), MATRIX.reduce(0)
GROUPS = plgpu.Layout.TILED(
    plgpu.Tiling(((LANES, 64), (LANES, 16), (LANES, 8), (1,))), warp_dims=(-6,), lane_dims=(-2, -3), vector_dim=-1
)
"""(4, tokens): tokens lie as rows of a wgmma's result do, and each of the lanes that share one has one of the 4."""


def layout_of(x: Array) -> Any:
    """Returns the layout of an array whose tokens or channels are a wgmma's rows."""
    if x.shape[0] == LANES:
        return GROUPS
    return MATRIX if x.ndim == 2 else ROWS


def load(ref: Any, layout: Any, *, optimized: bool = True) -> Array:
    """Returns all that lies in a piece of shared memory."""
    read: Any = plgpu.load  # Before jax 0.11 it has another signature.
    return read(ref, layout=layout, optimized=optimized)


def full(x: float, shape: tuple[int, ...], layout: Any) -> Array:
    return plgpu.layout_cast(jnp.full(shape, x, jnp.float32), layout)


def row_index(shape: tuple[int, ...]) -> Int[Array, "*shape"]:
    """Returns each element's row."""
    return plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=MATRIX if len(shape) == 2 else ROWS)


def across(x: Float[Array, "n"]) -> Float[Array, "n 8"]:
    """Returns x as each of 8 columns."""
    return lax.broadcast_in_dim(x, (x.shape[0], COLUMNS), (0,))


def down(x: Float[Array, "m"], n: int) -> Float[Array, "n m"]:
    """Returns x as each of n rows."""
    return lax.broadcast_in_dim(x, (n, x.shape[0]), (1,))


def joined(parts: Sequence[Array], axis: int = 0) -> Array:
    return parts[0] if len(parts) == 1 else lax.concatenate(parts, axis)


def folded(x: Array) -> Array:
    """Returns the sum of x's tiles of tokens."""
    return functools.reduce(jnp.add, _tiles(x))


def weighted(x: Array, weights: Sequence[float]) -> Array:
    """Returns x with its tiles of tokens scaled."""
    return joined([tile * weight for tile, weight in zip(_tiles(x), weights, strict=True)], _token_axis(x))


def scaled(x: Array, by: Array) -> Array:
    """Returns x with its columns scaled; `by` is one number, or has one for each 8th column."""
    if not by.shape:
        return x * by
    return x * joined([down(by, x.shape[0])] * (x.shape[1] // COLUMNS), 1)


def by_group(x: Float[Array, "n m"], group: int) -> Float[Array, "n 8"]:
    """Returns of each row the 8 columns of its group."""
    parts = [x[:, i : i + COLUMNS] for i in range(0, x.shape[1], COLUMNS)]
    row = row_index(parts[0].shape)
    return functools.reduce(lambda y, i: jnp.where(row >= i * group, parts[i], y), range(1, len(parts)), parts[0])


def _token_axis(x: Array) -> int:
    return 1 if x.shape[0] == LANES else 0


def _tiles(x: Array) -> list[Array]:
    tiles = [slice(i, i + TILE) for i in range(0, x.shape[_token_axis(x)], TILE)]
    return [x[:, tile] if _token_axis(x) else x[tile] for tile in tiles]
