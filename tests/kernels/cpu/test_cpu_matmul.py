"""CPU kernels: every format, kind of value and path against float64, no read past a buffer, any number of threads."""

import ctypes
import functools
import mmap
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from kernels.cpu import library, matmul
from kernels.weights.formats import NM, Bitmap, Full, Matrix

BF16 = ml_dtypes.bfloat16
ROOT = Path(__file__).resolve().parents[3]
VALUES = ["float32", "bfloat16", "float16", "int8", "int8 in groups", "int4", "int4 in odd groups", "int4 a row"]
KINDS = ["full", "1:4", "2:4", "4:8", "bitmap"]
# Inputs, outputs, rows of x: whole blocks; a rest; less than a block; one output; many rows of x; several threads.
SHAPES = [
    (128, 9, 1),
    (200, 6, 3),
    (24, 5, 1),
    (72, 1, 16),
    (576, 13, 16),
    (136, 7, 40),
    (1024, 320, 1),
    (1000, 270, 5),
]
ODD = [(37, 5, 1), (127, 6, 3)]
"""Inputs that no pattern divides: of int4 a row ends in half a byte."""


def compilers() -> list[str]:
    return [name for name in ("c++", "g++", "clang++") if shutil.which(name)]


def test_where_there_is_a_compiler_there_is_a_library():
    if not compilers():
        pytest.skip("no C++ compiler on this machine")
    assert library.missing() is None


@pytest.fixture(params=library.PATHS)
def path(request):
    if reason := library.missing():
        pytest.skip(reason)
    try:
        library.choose(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield library.path()
    library.choose("")


def kept(kind: str, rng: np.random.Generator, inputs: int, outputs: int) -> np.ndarray:
    """Which weights a format keeps, by output row; of a bitmap the first row nothing and the last all."""
    if kind == "full":
        return np.ones((outputs, inputs), bool)
    if kind == "bitmap":
        shares = np.linspace(0, 1, outputs) if outputs > 1 else np.array([0.5])
        return rng.random((outputs, inputs)) < shares[:, None]
    n, m = map(int, kind.split(":"))
    return (rng.random((outputs, inputs // m, m)).argsort(-1) < n).reshape(outputs, inputs)


def group_of(values: str, inputs: int) -> int:
    return min(inputs, {"int8 in groups": 64, "int4": 128, "int4 in odd groups": 24}.get(values, inputs))


def nibbles(codes: np.ndarray) -> np.ndarray:
    """Two codes a byte, the low four bits first."""
    codes = np.append(codes, np.zeros(codes.size % 2, np.int8))
    return np.array([(a + 8) | (b + 8) << 4 for a, b in codes.reshape(-1, 2)], np.uint8)


def matrix_and_weights(kind: str, values: str, inputs: int, outputs: int) -> tuple[Matrix, np.ndarray]:
    """A random matrix in a format, and its weights (R, K) in float64, made side by side: neither from the other."""
    rng = np.random.default_rng(inputs + outputs)
    mask = kept(kind, rng, inputs, outputs)
    group, scales = group_of(values, inputs), None
    if values.startswith("int"):
        most = 7 if values.startswith("int4") else 127
        rows = rng.integers(-most, most + 1, mask.shape).astype(np.int8)
        scales = rng.uniform(0.01, 0.02, (outputs, -(-inputs // group))).astype(BF16)
        weights = rows * scales.astype(np.float64)[:, np.arange(inputs) // group]
    else:
        dtype = BF16 if values == "bfloat16" else np.dtype(values)
        rows = rng.standard_normal(mask.shape).astype(dtype)
        rows[0, 0], rows[-1, -1] = 2.0**-20, -(2.0**-24)  # below float16's normal numbers
        weights = rows.astype(np.float64)
    runs = [row[chosen] for row, chosen in zip(rows, mask, strict=True)]
    bits = int(values[3]) if scales is not None else 8 * rows.dtype.itemsize
    stored = [nibbles(run) for run in runs] if bits == 4 else runs
    facts = {"scales": None if scales is None else jnp.asarray(scales), "inputs": inputs, "bits": bits, "group": group}
    packed = np.zeros((outputs, -(-inputs // 64) * 64), bool)
    packed[:, :inputs] = mask
    bitmask = jnp.asarray(np.packbits(packed, axis=1, bitorder="little"))
    if kind == "full":
        return Full(jnp.asarray(np.stack(stored)), **facts), weights
    if kind == "bitmap":
        counts = [run.size + run.size % 2 * (bits == 4) for run in runs]
        starts = jnp.asarray(np.cumsum([0, *counts]), jnp.int32)
        return Bitmap(jnp.asarray(np.concatenate(stored)), mask=bitmask, starts=starts, **facts), weights * mask
    n, m = map(int, kind.split(":"))
    return NM(jnp.asarray(np.stack(stored)), mask=bitmask, n=n, m=m, **facts), weights * mask


# One program for all shapes; the path is chosen when it runs.
products = jax.jit(lambda xs, matrices: [matmul.run(x, matrix) for x, matrix in zip(xs, matrices, strict=True)])
unpacked = jax.jit(lambda matrices: [matmul.unpack(matrix) for matrix in matrices])


@functools.cache
def cases(kind: str, values: str) -> tuple[list[jax.Array], list[Matrix], list[np.ndarray]]:
    """Activations, matrices and weights of all shapes."""
    shapes = SHAPES if ":" in kind else SHAPES + ODD
    pairs = [matrix_and_weights(kind, values, inputs, outputs) for inputs, outputs, _ in shapes]
    xs = [np.random.default_rng(1).standard_normal((rows, inputs)) for inputs, _, rows in shapes]
    return [jnp.float32(x) for x in xs], [matrix for matrix, _ in pairs], [weights for _, weights in pairs]


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_float64(path, kind, values):
    xs, matrices, weights = cases(kind, values)
    for x, w, found in zip(xs, weights, products(xs, matrices), strict=True):
        assert found.dtype == jnp.float32
        size = np.abs(np.float64(x)) @ np.abs(w).T
        assert (np.abs(found - np.float64(x) @ w.T) <= 1e-6 * size).all()
    for w, found in zip(weights, unpacked(matrices), strict=True):
        np.testing.assert_array_equal(found, w.astype(np.float32))


def test_what_other_rows_hold_does_not_matter(path):
    """A row's last block ends within the next row, whose infinite weight times x's fill of zeros would be NaN."""
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        values = jnp.ones((3, 72), dtype).at[1].set(jnp.inf)
        found = matmul.run(jnp.ones((1, 72)), Full(values, scales=None, inputs=72, bits=0, group=72))
        np.testing.assert_array_equal(found, [[72, np.inf, 72]])


@pytest.mark.parametrize("starts", [[0, 2**30, 2**30], [-(2**31), 0, 64], [0, 64, 32], [0, 32, 96]])
def test_starts_that_leave_the_values_are_refused(starts):
    if reason := library.missing():
        pytest.skip(reason)
    facts = {"scales": jnp.ones((2, 1), jnp.bfloat16), "inputs": 64, "bits": 8, "group": 64}
    values, mask = jnp.ones(64, jnp.int8), jnp.full((2, 8), 0x0F, jnp.uint8)
    matrix = Bitmap(values, **facts, mask=mask, starts=jnp.asarray(starts, jnp.int32))
    with pytest.raises(jax.errors.JaxRuntimeError, match="starts do not lead through the values"):
        jax.block_until_ready(matmul.run(jnp.ones((1, 64)), matrix))


def at_end_of_page(array: np.ndarray) -> np.ndarray:
    """Returns a copy that ends where memory that cannot be read begins."""
    pages = -(-array.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + pages), mmap.PAGESIZE, 0) == 0
    copy = np.frombuffer(memory, np.uint8, array.nbytes, pages - array.nbytes).view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


@pytest.mark.parametrize("values", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("kind", ["full", "2:4", "bitmap"])
def test_nothing_is_read_past_a_buffer(path, kind, values):
    # 64 rows: arrays of whole cache lines, which JAX takes as they are instead of copying them.
    inputs = 103 if kind == "full" else 104
    matrix, weights = matrix_and_weights("2:4" if kind == "bitmap" else kind, values, inputs, 64)
    if isinstance(matrix, NM) and kind == "bitmap":
        facts = {name: getattr(matrix, name) for name in ("mask", "scales", "inputs", "bits", "group")}
        matrix = Bitmap(matrix.values.reshape(-1), starts=jnp.arange(65, dtype=jnp.int32) * matrix.per_row, **facts)
    ends = jax.tree.map(lambda array: at_end_of_page(np.asarray(array)) if array.nbytes % 64 == 0 else array, matrix)
    placed = jax.tree.map(jax.device_put, ends)
    assert placed.values.unsafe_buffer_pointer() == ends.values.ctypes.data
    for rows in (1, 3):
        found = jax.jit(matmul.run)(jnp.ones((rows, inputs)), placed)
        np.testing.assert_allclose(found, np.tile(weights.sum(1), (rows, 1)), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(jax.jit(matmul.unpack)(placed), weights.astype(np.float32))


SUMS = """
import os
os.sched_setaffinity(0, os.sched_getaffinity(0) if {all} else list(os.sched_getaffinity(0))[:1])
import numpy as np, jax.numpy as jnp
from kernels.cpu import matmul
from kernels.weights.formats import Full
rng = np.random.default_rng(0)
codes, scales = rng.integers(-127, 128, (2050, 1000), np.int8), jnp.ones((2050, 1), jnp.bfloat16)
matrix = Full(codes, scales=scales, inputs=1000, bits=8, group=1000)
for rows in (1, 7):
    print(np.asarray(matmul.run(jnp.asarray(rng.standard_normal((rows, 1000)), jnp.float32), matrix)).tobytes().hex())
"""


@pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="this system does not say which cores a program may use"
)
def test_sums_do_not_depend_on_the_number_of_threads():
    if reason := library.missing():
        pytest.skip(reason)
    runs = [[sys.executable, "-c", SUMS.format(all=cores)] for cores in (True, False)]
    one, other = [subprocess.run(run, cwd=ROOT, check=True, capture_output=True).stdout for run in runs]
    assert one == other


def test_what_is_not_supported_is_said(monkeypatch):
    floats = Full(jnp.ones((2, 8)), scales=None, inputs=8, bits=32, group=8)
    codes = floats.replace(values=jnp.ones((2, 8), jnp.int16), bits=8, scales=jnp.ones((2, 1), jnp.bfloat16))
    assert "int16 with 8 bits" in (matmul.unsupported(jnp.ones((1, 8)), codes) or "")
    monkeypatch.setattr(library, "missing", lambda: "no library")
    assert matmul.unsupported(jnp.ones((1, 8)), floats) == "no library"
    with pytest.raises(ValueError, match="LMMJAX_CPU: got 'abacus', expected one of avx512, avx2, portable"):
        library.choose("abacus")
