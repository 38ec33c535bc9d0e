"""Products with Full, NM and Bitmap matrices on CPUs: arrays and static facts to the compiled kernels and back."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from kernels.cpu import library
from kernels.weights.formats import NM, Bitmap, Full, Matrix

BLOCK = 64
"""Inputs that a kernel takes at once."""
ONE_PASS = 64
"""Rows of x up to which the kernel multiplies; more go through the dense matrix, whose product XLA computes.

On two cores of an EPYC 7003 (AVX2), 576 x 1536 in int8: 16 rows 0.32 ms against 0.63, 64 rows 0.95 against 1.1,
128 rows 3.2 against 1.7.
"""
FLOATS = ("float32", "bfloat16", "float16")
CODES = {8: "int8", 4: "uint8"}


def unsupported(x: Float[Array, "m k"], matrix: Matrix) -> str | None:
    """Returns why the kernels cannot multiply x by this matrix, or None."""
    if jax.default_backend() != "cpu":
        return f"JAX computes on {jax.default_backend()}, not on a CPU"
    if not isinstance(matrix, Full | NM | Bitmap):
        return f"{type(matrix).__name__} is no format that the CPU kernels read"
    dtype = str(matrix.values.dtype)
    if dtype not in ((CODES.get(matrix.bits),) if matrix.scales is not None else FLOATS):
        return f"values of {dtype} with {matrix.bits} bits are none that the CPU kernels read"
    return library.missing()


def run(x: Float[Array, "m k"], matrix: Matrix) -> Float[Array, "m r"]:
    """Returns x @ matrix in x's dtype; sums are in float32."""
    return run_many(x, [matrix])[0]


def run_many(x: Float[Array, "m k"], matrices: Sequence[Matrix]) -> list[Float[Array, "m r"]]:
    """Returns x @ matrix for each of several matrices with the same inputs, in a single call."""
    if x.shape[0] > ONE_PASS:
        return [_dense(x, matrix) for matrix in matrices]
    inputs = x.shape[1]
    filled = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, -inputs % BLOCK)))
    shapes = [jax.ShapeDtypeStruct((x.shape[0], matrix.outputs), jnp.float32) for matrix in matrices]
    library.load()
    call = jax.ffi.ffi_call("lmmjax_product", shapes)
    facts = {"groups": _static(map(_group, matrices)), "per_row": _static(map(_per_row, matrices))}
    found = call(filled, *(array for matrix in matrices for array in _arrays(matrix)), inputs=np.int64(inputs), **facts)
    return [product.astype(x.dtype) for product in found]


def unpack(matrix: Matrix) -> Float[Array, "r k"]:
    """Returns all weights by output row in float32, zeros in place."""
    library.load()
    call = jax.ffi.ffi_call("lmmjax_unpack", jax.ShapeDtypeStruct((matrix.outputs, matrix.inputs), jnp.float32))
    return call(*_arrays(matrix), group=np.int64(_group(matrix)), per_row=np.int64(_per_row(matrix)))


def _dense(x: Float[Array, "m k"], matrix: Matrix) -> Float[Array, "m r"]:
    return jnp.dot(x.astype(jnp.float32), unpack(matrix).T).astype(x.dtype)


def _static(numbers) -> np.ndarray:
    return np.fromiter(numbers, np.int64)


def _group(matrix: Matrix) -> int:
    return max(1, min(matrix.group or matrix.inputs, matrix.inputs))


def _per_row(matrix: Matrix) -> int:
    """Returns how many values each row has, where all have the same."""
    if isinstance(matrix, NM):
        return matrix.per_row
    return matrix.inputs if isinstance(matrix, Full) else 0


def _arrays(matrix: Matrix) -> list[Array]:
    """Returns mask, values, starts and scales; those that the format does not have are empty."""
    given = [getattr(matrix, name, None) for name in ("mask", "values", "starts", "scales")]
    kinds = (jnp.uint8, None, jnp.int32, jnp.bfloat16)
    return [jnp.zeros(0, kind) if array is None else array for array, kind in zip(given, kinds, strict=True)]
