"""The call for one row of x: one launch, in which every program makes x ready for itself."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from kernels.gpu.device import Device
from kernels.gpu.weights import layout
from kernels.gpu.weights.layout import Arranged
from kernels.gpu.weights.vector import dense, pairs
from kernels.gpu.weights.vector.program import facts

MOST_INPUTS = 16384
"""The most inputs: all of a row is held in registers."""
ROWS = 8
"""Rows of the matrix that are taken at once."""
PROGRAMS = {
    ("dense", 8): (4, 3, 2),
    ("dense", 4): (3, 2, 4),
    ("2:4", 16): (3, 4, 2),
    ("2:4", 8): (3, 2, 4),
    ("2:4", 4): (3, 4, 2),
}
"""How many programs a multiprocessor may have, the best first, by kind and bits."""


class Share(NamedTuple):
    """Rows of the matrix that a program takes at once, its warps, and how many programs there are."""

    rows: int
    warps: int
    programs: int


def share_of(matrix: Arranged, gpu: Device) -> Share:
    """Returns how to share a product: so that no multiprocessor has many turns more than the others.

    Which of several such counts is best was measured on an H200 with 7B's shapes. Where there are few turns, making x
    ready takes as long as one: formats that are read and multiplied fast had better do it in two programs than in four.
    Long rows leave registers for two or three at once; further ones wait.
    """
    turns = matrix.values.shape[0] // ROWS
    each = min(PROGRAMS[matrix.kind, matrix.bits], key=lambda count: count * -(-turns // (count * gpu.cores)))
    return Share(ROWS, 4, each * gpu.cores)


def unsupported(x: Float[Array, "m k"], matrix: Arranged) -> str | None:
    """Returns why a product is not for this kernel, or None."""
    if x.shape[0] > 1:
        return f"it takes one row of x, got {x.shape[0]}"
    if matrix.inputs > MOST_INPUTS:
        return f"it takes up to {MOST_INPUTS} inputs, got {matrix.inputs}"
    floats = matrix.scales is None and matrix.values.dtype != jnp.bfloat16
    return f"its floats are bfloat16, not {matrix.values.dtype}" if floats else None


@functools.partial(jax.jit, static_argnames=("share", "interpret"))
def product(x: Float[Array, "1 k"], matrix: Arranged, share: Share, interpret: bool = False) -> Float[Array, "1 r"]:
    """Returns x @ matrix in x's dtype; x is rounded to 16 bits of its largest number, or to bfloat16 for floats."""
    held = matrix.values.shape[0]
    common = facts(matrix, share.rows, share.programs, interpret)
    two = isinstance(matrix, layout.Pairs)
    kind, read = (pairs.Pairs, [matrix.mask, matrix.values]) if two else (dense.Dense, [matrix.values])
    program = kind(**common, words=read[0].shape[1], chunk=kind.WIDE * 32 * share.warps)
    if matrix.scales is not None:
        read.append(matrix.scales)
    y = pl.pallas_call(
        program,
        grid=(program.programs,),
        out_shape=jax.ShapeDtypeStruct((held,), x.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=share.warps, num_stages=1),
        interpret=interpret,
        name=f"weights_row_{matrix.kind.replace(':', '_')}_{matrix.bits}",
    )(x[0], *read)
    return y[None, : matrix.outputs]
