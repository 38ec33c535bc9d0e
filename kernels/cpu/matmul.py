"""Products with Full, NM and Bitmap matrices on CPUs: arrays and static facts to the compiled kernels and back."""

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
    m, inputs = x.shape
    if m > ONE_PASS:
        return jnp.dot(x.astype(jnp.float32), unpack(matrix).T).astype(x.dtype)
    library.load()
    call = jax.ffi.ffi_call("lmmjax_product", jax.ShapeDtypeStruct((m, matrix.outputs), jnp.float32))
    filled = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, -inputs % BLOCK)))
    return call(filled, *_arrays(matrix), inputs=np.int64(inputs), **_facts(matrix)).astype(x.dtype)


def unpack(matrix: Matrix) -> Float[Array, "r k"]:
    """Returns all weights by output row in float32, zeros in place."""
    library.load()
    call = jax.ffi.ffi_call("lmmjax_unpack", jax.ShapeDtypeStruct((matrix.outputs, matrix.inputs), jnp.float32))
    return call(*_arrays(matrix), **_facts(matrix))


def _facts(matrix: Matrix) -> dict[str, np.int64]:
    """Returns what the arrays do not say."""
    group = max(1, min(matrix.group or matrix.inputs, matrix.inputs))
    return {"group": np.int64(group), "per_row": np.int64(_per_row(matrix))}


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
