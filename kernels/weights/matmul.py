"""The public op: rows of activations times a matrix in any format. Contract, validation and choice of backend."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels import backends
from kernels.backends import Backend
from kernels.cpu import matmul as cpu
from kernels.gpu import device
from kernels.gpu.weights import matmul as triton
from kernels.gpu.weights import mosaic
from kernels.gpu.weights.arrange import arranged, why_not
from kernels.weights.formats import Full, Matrix, Table


def unpacked(x: Float[Array, "m k"], matrix: Matrix) -> Float[Array, "m r"]:
    """Returns x @ matrix by way of the dense matrix: what the op means."""
    product = jnp.dot(x.astype(jnp.float32), matrix.rows().T, precision="highest")
    return product.astype(x.dtype)


BACKENDS: dict[str, Backend] = {
    "cpu": Backend(cpu.run, cpu.unsupported),
    "triton": Backend(triton.run, triton.unsupported),
    "rounded": Backend(triton.unpacked, triton.not_unpacked),
    "unpacked": Backend(unpacked, lambda *_: None),
    "mosaic": Backend(mosaic.run, mosaic.unsupported),
}
"""In order of preference: without a choice, the first that has no reason against it runs.

cpu reads weights as they are kept, and so does triton for a few rows; rounded is a GPU's for more of them. mosaic
stands behind unpacked, which can do anything: it runs by explicit choice alone until both are measured.
"""


def placed(matrix: Matrix) -> Matrix | Array:
    """Returns a matrix as this device multiplies by it: to be called once, when it is loaded.

    A GPU's own product is best for floats without zeros, so they become a plain kernel there.
    """
    if device.current() is None or isinstance(matrix, Table):
        return matrix
    if isinstance(matrix, Full) and matrix.scales is None:
        return matrix.dense()
    return matrix if why_not(matrix) else jax.jit(arranged)(matrix)


def matmul(x: Float[Array, "*batch k"], matrix: Matrix, backend: str | None = None) -> Float[Array, "*batch r"]:
    """Returns x @ matrix in x's dtype, each product's sum in float32. Activations are not rounded.

    Args:
        x: activations.
        matrix: weights in any format; codes are taken times their scales in float32.
        backend: a name in `BACKENDS`. An explicit choice never falls back.

    Raises:
        ValueError: shapes do not fit, or the chosen backend cannot serve this call (says why).
    """
    if x.shape[-1] != matrix.inputs:
        raise ValueError(f"x: got shape {x.shape}, expected {matrix.inputs} on the last axis")
    rows = x.reshape(-1, matrix.inputs)
    if matrix.order is not None:  # here, for all backends: it is x that is brought into the rows' order
        rows, matrix = jnp.take(rows, matrix.order, axis=1, mode="clip"), matrix.replace(order=None)
    chosen = choose(backend, rows, matrix)
    return BACKENDS[chosen].run(rows, matrix).reshape(*x.shape[:-1], matrix.outputs)


def choose(name: str | None, x: Array | jax.ShapeDtypeStruct, matrix: Matrix) -> str:
    """Returns the name of the backend that multiplies x (m, k): `name` if it is given and able, else the first."""
    return backends.choose(name, BACKENDS, "multiply by this matrix", x, matrix)
