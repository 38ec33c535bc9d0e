"""The call of the Triton kernel: a program for every block of rows and share of the inputs, and the sum of shares."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from kernels.gpu.triton.shapes import COLUMNS, power
from kernels.gpu.weights.layout import Arranged, Pairs
from kernels.gpu.weights.operand import operand
from kernels.gpu.weights.program import Program
from kernels.gpu.weights.tiles import Tiles

MOST = 16
"""The most rows of x: they are the columns of a product, 8 or 16."""


@functools.partial(jax.jit, static_argnames=("tiles", "interpret"))  # layers alike are traced and lowered once
def product(x: Float[Array, "m k"], matrix: Arranged, tiles: Tiles, interpret: bool = False) -> Float[Array, "m r"]:
    """Returns x @ matrix in x's dtype; x is rounded to float16, or to bfloat16 for weights in it."""
    m, held = x.shape[0], matrix.values.shape[0]
    results = power(m)
    arrays = [x for x in operand(x, matrix, max(results, COLUMNS), interpret) if x is not None]
    specs = [pl.BlockSpec(whole.shape, lambda row, share, n=whole.ndim: (0,) * n) for whole in arrays]
    if matrix.grouped and matrix.scales is not None:
        arrays.append(matrix.scales)
        specs.append(pl.BlockSpec((matrix.scales.shape[0], tiles.rows), lambda row, share: (0, row)))
    read = [matrix.values, matrix.mask] if isinstance(matrix, Pairs) else [matrix.values]
    specs += [pl.BlockSpec((tiles.rows, rows.shape[1]), lambda row, share: (row, 0)) for rows in read]
    shares = pl.pallas_call(
        Program.of(matrix, tiles, results, interpret),
        grid=(held // tiles.rows, tiles.splits),
        in_specs=specs,
        out_specs=pl.BlockSpec((None, tiles.rows, results), lambda row, share: (share, row, 0)),
        out_shape=jax.ShapeDtypeStruct((tiles.splits, held, results), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name=f"weights_{matrix.kind.replace(':', '_')}_{matrix.bits}",
    )(*arrays, *read)
    y = jnp.sum(shares, axis=0)[: matrix.outputs, :m]
    if matrix.scales is not None and not matrix.grouped:
        y *= matrix.scales[0, : matrix.outputs, None].astype(jnp.float32)
    return y.T.astype(x.dtype)
