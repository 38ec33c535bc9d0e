"""Products with weight matrices: kernels interpreted against float64, layouts there and back, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import DTypeLike

from kernels.cases import relative_error
from kernels.gpu import device
from kernels.gpu.device import EMULATED, Device
from kernels.gpu.weights import matmul
from kernels.gpu.weights.arrange import arranged
from kernels.gpu.weights.call import product
from kernels.gpu.weights.cases import CASES, FORMATS, LAYERS, Case, product64
from kernels.gpu.weights.tiles import tiles_of
from kernels.gpu.weights.vector import call as vector
from kernels.weights import WeightFormat, encode
from kernels.weights import matmul as op
from kernels.weights.formats import Matrix

LIMIT = 2e-3
"""The most that rounding may cost. In both 16-bit types x and products are exact here: only sums are rounded."""
H100 = Device((9, 0), 132, "NVIDIA H100 80GB HBM3")


@pytest.mark.parametrize("name", CASES)
def test_interpreted_equals_float64(name: str):
    case = CASES[name]
    matrix, x = case.matrix(), jnp.asarray(case.x())
    with device.speaking_of(EMULATED):
        made = arranged(matrix)
        assert matmul.unsupported(x, made) is None
    out = product(x, made, tiles_of(made, EMULATED), interpret=True)
    assert relative_error(np.asarray(out), product64(x, matrix)) <= LIMIT / 10


@pytest.mark.parametrize("name", ["int8", "2:4 in int8", "2:4 in float16, a part of a tile"])
@pytest.mark.parametrize("m", [1, 2])
def test_one_row_has_a_kernel_of_its_own(name: str, m: int):
    case = dataclasses.replace(CASES[name], m=m)
    x, made = jnp.asarray(case.x()), arranged(case.matrix())
    with device.speaking_of(EMULATED):
        out = matmul.run(x, made)
    own = m == 1 and case.values == jnp.bfloat16
    tiles = vector.share_of(made, EMULATED) if own else tiles_of(made, EMULATED)
    expected = (vector.product if own else product)(x, made, tiles, interpret=True)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("name", CASES)
def test_a_layout_is_exact_and_has_a_way_back(name: str):
    matrix = CASES[name].matrix()
    made = jax.jit(arranged)(matrix)
    back = jax.jit(type(made).canonical)(made)
    assert jax.tree.structure(back) == jax.tree.structure(matrix)
    for found, expected in zip(jax.tree.leaves(back), jax.tree.leaves(matrix), strict=True):
        assert found.dtype == expected.dtype
        assert np.asarray(found).tobytes() == expected.tobytes()
    np.testing.assert_array_equal(made.rows(), matrix.rows())
    np.testing.assert_array_equal(made.dense(), matrix.dense())
    assert (made.shape, made.kind, made.kept) == (matrix.shape, matrix.kind, matrix.kept)


@pytest.mark.parametrize("m", [1, 3, 40])
def test_a_matrix_in_an_order_of_its_own(m: int):
    """One row, a few and many: three ways, and x is brought into the order before each."""
    case = Case("2:4", 8, 128, (256, 40), m=m)
    matrix, x = case.matrix(), jnp.asarray(case.x(), jnp.bfloat16)
    order = np.random.default_rng(0).permutation(256)
    made = jax.jit(arranged)(matrix.replace(order=jnp.asarray(order)))
    np.testing.assert_array_equal(made.rows()[:, order], matrix.rows())
    np.testing.assert_array_equal(made.canonical().rows(), made.rows())
    with device.speaking_of(EMULATED):
        backend = "rounded" if m > 16 else "triton"
        found = op.matmul(x[:, order.argsort()], made, backend)
        expected = op.matmul(x, arranged(matrix), backend)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", FORMATS)
def test_what_fills_up_blocks_is_little(layer: str, name: str):
    for inputs, outputs, _ in LAYERS[layer].values():
        case = FORMATS[name]
        made = Case(case.kind, case.bits, case.group, (inputs, outputs)).abstract()
        plain = WeightFormat(case.kind, case.bits, case.group).nbytes(inputs, outputs, inputs // 2)
        assert made.nbytes <= 1.03 * plain


@pytest.mark.parametrize("scale", [2.0**-40, 3e4])
def test_x_of_any_size(scale: float):
    """float16 alone would overflow, or lose what is small."""
    case = CASES["int4, groups of 64"]
    matrix, x = case.matrix(), (case.x() * scale).astype(jnp.bfloat16).astype(np.float32)
    out = product(jnp.asarray(x), arranged(matrix), tiles_of(arranged(matrix), EMULATED), interpret=True)
    assert relative_error(np.asarray(out), product64(x, matrix)) <= LIMIT / 10


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_result_is_in_the_dtype_of_x(dtype):
    matrix = CASES["int8"].matrix()
    x = jnp.asarray(CASES["int8"].x(), dtype)
    out = product(x, arranged(matrix), tiles_of(arranged(matrix), EMULATED), interpret=True)
    assert out.dtype == dtype
    assert relative_error(np.asarray(out, np.float32), product64(x, matrix)) <= 2 * LIMIT


def test_many_rows_are_unpacked():
    case = Case("2:4", 8, 128, (256, 40), m=40)
    matrix, x = case.matrix(), jnp.asarray(case.x(), jnp.bfloat16)
    with device.speaking_of(EMULATED):
        made = arranged(matrix)
        assert matmul.unsupported(x, made) == "it takes up to 16 rows of x, got 40"
        assert matmul.not_unpacked(x, made) is None
        assert matmul.not_unpacked(x[:16], made) == "up to 16 rows of x are the kernel's"
        out = matmul.unpacked(x, made)
    assert relative_error(np.asarray(out, np.float32), product64(x, matrix)) <= 2 * LIMIT


def encoded(kind: str, bits: int, group: int | None = None, dtype: DTypeLike = np.float32) -> Matrix:
    kernel = np.zeros((64, 8), dtype)
    kernel[::4] = 1
    return encode(kernel, WeightFormat(kind, bits, group))


@pytest.mark.parametrize(
    ("matrix", "reason"),
    [
        (encoded("bitmap", 8), "it reads dense and 2:4 weights, not bitmap"),
        (encoded("1:4", 8), "it reads dense and 2:4 weights, not 1:4"),
        (encoded("dense", 16, dtype=np.float16), "floats without zeros are the plain product's"),
        (encoded("2:4", 32), "it reads 2:4 floats of 16 bits, not 32"),
        (encoded("dense", 8, 32), "32 inputs share a scale, not 64 or 128 or a whole row"),
        (encoded("dense", 8), "it reads matrices that were `arranged` at load"),
    ],
)
def test_what_no_kernel_reads_is_refused_with_its_reason(matrix: Matrix, reason: str):
    x = jnp.ones((1, 64))
    with device.speaking_of(EMULATED):
        assert matmul.unsupported(x, matrix) == reason
    if "arranged" not in reason:
        with pytest.raises(ValueError, match=reason[:20]):
            arranged(matrix)


def test_without_a_gpu_it_says_so():
    if device.current() is not None:
        pytest.skip("this machine has a GPU")
    assert matmul.unsupported(jnp.ones((1, 64)), arranged(encoded("dense", 8))) == "it needs a CUDA device"


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(4096, 4096), (11008, 4096), (4096, 11008), (576, 192)])
def test_programs_fill_the_device_and_share_all_steps(name: str, shape: tuple[int, int]):
    case = FORMATS[name]
    made = Case(case.kind, case.bits, case.group, shape).abstract()
    tiles = tiles_of(made, H100)
    steps = made.blocks // tiles.step
    assert made.blocks % tiles.step == 0
    assert made.values.shape[0] % tiles.rows == 0
    # All programs have steps.
    assert -(-steps // -(-steps // tiles.splits)) == tiles.splits
    assert made.values.shape[0] // tiles.rows * tiles.splits >= min(2 * H100.cores, made.values.shape[0] // 64)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_a_gpu_equals_float64(name: str):
    if (gpu := device.current()) is None:
        pytest.skip("needs a CUDA device")
    case = CASES[name]
    matrix, x = case.matrix(), jnp.asarray(case.x())
    made = arranged(matrix)
    out = product(x, made, tiles_of(made, gpu))
    assert relative_error(np.asarray(out), product64(x, matrix)) <= LIMIT
    np.testing.assert_array_equal(jax.jit(matmul.run)(x, made), out if case.m > 1 else matmul.run(x, made))
