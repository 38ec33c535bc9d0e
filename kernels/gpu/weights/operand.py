"""Activations as kernels multiply with them: planes of every p-th input, and what fields' 1024 adds to products."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from kernels.gpu.fields import BIAS, fields
from kernels.gpu.weights.layout import OFFSET, Arranged, Pairs

LARGEST = 2.0**13
"""What each row's largest power of two becomes in float16: it neither overflows nor loses what is small beside it."""


class Operand(NamedTuple):
    """Rows of x as columns of a product.

    planes (p, blocks * c, m); sums (blocks, m) are what the products of a block have too much, None: nothing; the
    result times `factor` (m,) is that of x.
    """

    planes: Float[Array, "p n m"]
    sums: Float[Array, "blocks m"] | None
    factor: Float[Array, "m"]


def operand(x: Float[Array, "m k"], matrix: Arranged, columns: int) -> Operand:
    """Returns x for a matrix, filled up with zeros to so many columns."""
    p, blocks, c = matrix.planes, matrix.blocks, matrix.columns
    padded = jnp.pad(x, ((0, columns - x.shape[0]), (0, p * blocks * c - x.shape[1]))).astype(jnp.float32)
    dtype = matrix.values.dtype if matrix.scales is None else jnp.float16
    factor = jnp.ones(columns, jnp.float32) if dtype == jnp.bfloat16 else _power(padded) / LARGEST
    planes = (padded / factor[:, None]).reshape(columns, blocks, c, p).transpose(3, 1, 2, 0)
    if matrix.scales is None:
        return Operand(planes.astype(dtype).reshape(p, blocks * c, columns), None, factor)
    units = jnp.asarray(_units(matrix), jnp.float32)[:, :, None, None]
    planes = (planes * units).astype(dtype)
    # From the planes as they were rounded: what is subtracted is large beside what is left.
    sums = jnp.sum(planes.astype(jnp.float32) * (BIAS + OFFSET[matrix.bits] / units), axis=(0, 2))
    return Operand(planes.reshape(p, blocks * c, columns), sums, factor)


def _units(matrix: Arranged) -> np.ndarray:
    """Returns what a code is multiplied with for each plane and block, (p, blocks): 2^-pos of its field."""
    units = np.array([0.5 ** (field.index * field.width % 8) for field in fields(matrix.bits)[0]])
    if isinstance(matrix, Pairs):
        return np.broadcast_to(np.resize(units, matrix.blocks), (matrix.planes, matrix.blocks))
    return np.broadcast_to(units[:, None], (matrix.planes, matrix.blocks))


def _power(x: Float[Array, "m k"]) -> Float[Array, "m"]:
    """Returns the power of two at or below each row's largest number; 2^-100 at least."""
    largest = jnp.maximum(jnp.max(jnp.abs(x), axis=1), 2.0**-100)
    return jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(largest, jnp.int32) & 0x7F800000, jnp.float32)
