"""Products with weight matrices on a GPU: by kernels for one row of x and for a few, by unpacking and XLA for more."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.gpu import device
from kernels.gpu.weights.arrange import why_not
from kernels.gpu.weights.call import MOST, product
from kernels.gpu.weights.layout import Arranged
from kernels.gpu.weights.tiles import tiles_of
from kernels.gpu.weights.vector import call as vector
from kernels.weights.formats import Matrix


def run(x: Float[Array, "m k"], matrix: Matrix) -> Float[Array, "m r"]:
    """Returns x @ matrix by the kernel for so many rows."""
    gpu = device.current()
    assert gpu is not None
    assert isinstance(matrix, Arranged)
    if vector.unsupported(x, matrix) is None:
        return vector.product(x, matrix, vector.share_of(matrix, gpu), gpu.interpret)
    return product(x, matrix, tiles_of(matrix, gpu), gpu.interpret)


def unsupported(x: Float[Array, "m k"], matrix: Matrix) -> str | None:
    """Returns why the kernel cannot compute a product, or None."""
    reason = _unreadable(matrix)
    if reason is None and x.shape[0] > MOST:
        return f"it takes up to {MOST} rows of x, got {x.shape[0]}"
    if reason is None and x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"it takes x in bfloat16, float16 or float32, got {x.dtype}"
    return reason


def unpacked(x: Float[Array, "m k"], matrix: Matrix) -> Float[Array, "m r"]:
    """Returns x @ matrix by way of the dense matrix in x's dtype, to which weights are rounded.

    Many rows are a matter of arithmetic, and matrix units want both sides alike.
    """
    dense = matrix.rows().astype(x.dtype).T
    return jnp.dot(x, dense, preferred_element_type=jnp.float32).astype(x.dtype)


def not_unpacked(x: Float[Array, "m k"], matrix: Matrix) -> str | None:
    """Returns why `unpacked` is not for a product, or None."""
    reason = _unreadable(matrix)
    if reason is None and x.shape[0] <= MOST:
        return f"up to {MOST} rows of x are the kernel's"
    return reason


def _unreadable(matrix: Matrix) -> str | None:
    if reason := device.lacking() or why_not(matrix):
        return reason
    return None if isinstance(matrix, Arranged) else "it reads matrices that were `arranged` at load"
