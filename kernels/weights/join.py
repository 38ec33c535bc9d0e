"""Matrices that meet the same activations become one, for a single product: its outputs are theirs in order."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kernels.gpu.weights.layout import Arranged
from kernels.weights.formats import Bitmap, Matrix, Table


def joined(matrices: Sequence[Matrix | Array]) -> Matrix | Array | None:
    """Returns the matrix whose outputs are those of all in order; None if they cannot be one.

    They must be of one format, without an order of inputs, and not be filled up between their outputs. Nothing is
    computed: each weight is bit for bit what it was. Pure, and can be jitted. Plain kernels (in, out) may be joined.
    """
    packed = [matrix for matrix in matrices if isinstance(matrix, Matrix)]
    if len(packed) == len(matrices):
        return _packed(packed)
    plain = [matrix for matrix in matrices if not isinstance(matrix, Matrix)]
    alike = {(one.dtype, one.shape[0]) for one in plain}
    return None if packed or len(alike) > 1 else jnp.concatenate(plain, axis=1)


def _packed(matrices: Sequence[Matrix]) -> Matrix | None:
    first = matrices[0]
    if any(_nature(one) != _nature(first) for one in matrices) or isinstance(first, Table):
        return None
    if first.order is not None:  # each has its own
        return None
    if isinstance(first, Arranged):
        if any(one.outputs < one.values.shape[0] for one in matrices):
            return None
        outputs = sum(one.outputs for one in matrices)
        return first.replace(outputs_=outputs, **_arrays(matrices, scales=1))
    if isinstance(first, Bitmap):
        if sum(one.kept for one in matrices) > jnp.iinfo(jnp.int32).max:
            return None
        return first.replace(starts=_starts(matrices), **_arrays(matrices))
    return first.replace(**_arrays(matrices))


def _nature(matrix: Matrix) -> tuple[Any, ...]:
    """Returns what matrices must have in common."""
    like = matrix.replace(outputs_=0) if isinstance(matrix, Arranged) else matrix
    return jax.tree.structure(like), *(leaf.dtype for leaf in jax.tree.leaves(like))


def _arrays(matrices: Sequence[Matrix], scales: int = 0) -> dict[str, Array]:
    """Returns the arrays that lie by output, one matrix's behind the other's; `scales` is the axis along which."""
    axes = {"values": 0, "mask": 0, "scales": scales}
    names = [name for name in axes if getattr(matrices[0], name, None) is not None]
    return {name: jnp.concatenate([getattr(one, name) for one in matrices], axes[name]) for name in names}


def _starts(matrices: Sequence[Any]) -> Array:
    """Returns where a bitmap's rows begin, behind all that the matrices before it hold."""
    before, found = 0, []
    for one in matrices:
        found.append(one.starts[:-1] + before)
        before += one.kept
    return jnp.concatenate([*found, jnp.full(1, before, jnp.int32)])
