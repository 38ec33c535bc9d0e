"""Weight formats: floats come back as they were, codes within half a step, bytes as predicted, products as dense."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.weights import WeightFormat, encode
from kernels.weights.facts import arrays, assembled, described
from kernels.weights.matmul import matmul

BF16 = np.dtype(ml_dtypes.bfloat16)
SHAPES = [(96, 40), (72, 7), (8, 1), (192, 33)]


def pruned(inputs: int, outputs: int, kind: str, dtype=np.float32, seed: int = 0) -> np.ndarray:
    """A kernel with half of its weights zero, in the pattern if there is one; one output has none left, one all."""
    rng = np.random.default_rng(seed)
    kernel = rng.standard_normal((inputs, outputs)).astype(np.float32)
    if ":" in kind:
        n, m = map(int, kind.split(":"))
        ranks = rng.random((inputs // m, m, outputs)).argsort(1).argsort(1).reshape(inputs, outputs)
        kernel[ranks >= n] = 0
    elif kind == "bitmap":
        kernel[rng.random(kernel.shape) < 0.5] = 0
        kernel[:, -1] = rng.standard_normal(inputs)
    kernel[:, 0] *= kind == "dense"
    return kernel.astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16], ids=str)
@pytest.mark.parametrize("kind", ["dense", "bitmap", "2:4", "1:4", "4:8"])
@pytest.mark.parametrize("shape", SHAPES)
def test_floats_come_back_as_they_were(shape, kind, dtype):
    kernel = pruned(*shape, kind, dtype)
    matrix = encode(kernel, WeightFormat(kind, 8 * kernel.dtype.itemsize))
    assert matrix.shape == kernel.shape
    np.testing.assert_array_equal(np.asarray(matrix.dense()), kernel)
    assert matrix.dense().dtype == kernel.dtype


@pytest.mark.parametrize("group", [None, 32, 64])
@pytest.mark.parametrize("kind", ["dense", "bitmap", "2:4"])
@pytest.mark.parametrize("bits", [8, 4])
def test_codes_are_within_half_a_step_and_zeros_stay(bits, kind, group):
    kernel = pruned(192, 33, kind)
    found = np.asarray(encode(kernel, WeightFormat(kind, bits, group)).dense())
    np.testing.assert_array_equal(found[kernel == 0], 0)
    rows = kernel.T.reshape(33, -1, group or 192)
    step = np.abs(rows).max(-1, keepdims=True) / (127 if bits == 8 else 7)
    error = np.abs(found.T.reshape(rows.shape) - rows)
    if bits == 8:
        assert (error <= 0.5 * step * (1 + 2**-7) + 1e-7).all()  # the scale is rounded up, by at most 2^-7 of it
    else:  # narrower ranges may clip outliers, but never at the price of the squared error
        plain = np.rint(rows / np.where(step, step, 1)) * step - rows
        assert np.square(error).sum() <= 1.02 * np.square(plain).sum()


def test_int4_is_better_for_a_narrower_range():
    """A group with one outlier: without a search for the range, all others are rounded to few levels."""
    kernel = np.random.default_rng(0).standard_normal((64, 50)).astype(np.float32)
    kernel[0] = 5
    found = np.asarray(encode(kernel, WeightFormat("dense", 4, 64)).dense())
    plain = np.rint(kernel / (5 / 7)) * np.float32(5 / 7)
    assert np.square(found - kernel).sum() < 0.97 * np.square(plain - kernel).sum()


def test_scales_come_from_what_is_kept():
    kernel = np.zeros((64, 2), np.float32)
    kernel[3] = 1e-3
    matrix = encode(kernel, WeightFormat("bitmap", 8, 32))
    assert matrix.scales is not None
    assert matrix.scales.dtype == BF16
    np.testing.assert_array_equal(np.float32(matrix.scales[:, 1]), 0)  # a group of nothing
    np.testing.assert_allclose(np.asarray(matrix.dense())[3], 1e-3, rtol=2**-7)


@given(
    inputs=st.integers(1, 140),
    outputs=st.integers(1, 6),
    bits=st.sampled_from([32, 8, 4]),
    group=st.one_of(st.none(), st.integers(1, 150)),
    share=st.floats(0, 1),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_bytes_are_those_predicted(inputs, outputs, bits, group, share, seed):
    rng = np.random.default_rng(seed)
    kernel = np.float32(rng.standard_normal((inputs, outputs)) * (rng.random((inputs, outputs)) < share))
    for kind in ("dense", "bitmap"):
        form = WeightFormat(kind, bits, group and min(group, inputs))
        matrix = encode(kernel, form)
        assert form.nbytes(inputs, outputs, [int(n) for n in (kernel != 0).sum(0)]) == matrix.nbytes
        assert bits < 32 or np.array_equal(matrix.dense(), kernel)


@pytest.mark.parametrize("form", [WeightFormat("bitmap"), WeightFormat("2:4", 8)], ids=str)
def test_sizes_at_half_the_weights(form):
    """Of bfloat16's bytes: 9/16 for a bitmap, 5/16 for 2:4 in int8, and a place or a scale a row."""
    kernel = pruned(4096, 64, form.kind, BF16)
    share = form.nbytes(4096, 64, 2048) / kernel.nbytes
    assert share <= {"bitmap": 0.57, "2:4": 0.32}[form.kind]


@pytest.mark.parametrize("bits", [32, 16, 8, 4])
@pytest.mark.parametrize("kind", ["dense", "bitmap", "2:4"])
def test_products_are_those_of_the_dense_matrix(kind, bits):
    kernel = pruned(72, 21, kind, BF16 if bits == 16 else np.float32)
    matrix = encode(kernel, WeightFormat(kind, bits, 24))
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 3, 72)), jnp.float32)
    expected = np.float64(x) @ np.float64(np.asarray(matrix.dense()))
    np.testing.assert_allclose(jax.jit(lambda x, w: x @ w)(x, matrix), expected, atol=2e-5)
    assert (x.astype(jnp.bfloat16) @ matrix).dtype == jnp.bfloat16


@pytest.mark.parametrize("rows", [1, 6, 70])
@pytest.mark.parametrize("bits", [32, 16, 8, 4])
@pytest.mark.parametrize("kind", ["2:4", "1:4"])
def test_an_order_of_inputs_is_the_matrixs_own_affair(kind, bits, rows):
    """Pruned in an order, a kernel is packed in it: weights and products are those of the inputs as they were."""
    rng = np.random.default_rng(2)
    order, place = rng.permutation(72), np.empty(72, int)
    place[order] = np.arange(72)
    kernel = pruned(72, 21, kind, BF16 if bits == 16 else np.float32)[place]
    form = WeightFormat(kind, bits, 24)
    with pytest.raises(ValueError, match="weights that are not zero among 4 inputs"):
        encode(kernel, form)
    matrix = encode(kernel, form, order)
    assert matrix.nbytes == form.nbytes(72, 21, 0) + 4 * 72
    found = np.asarray(matrix.dense(), np.float32)
    np.testing.assert_array_equal(found, np.asarray(encode(kernel[order], form).dense(), np.float32)[place])
    if bits >= 16:
        np.testing.assert_array_equal(found, np.float32(kernel))
    x = rng.standard_normal((rows, 72)).astype(np.float32)
    np.testing.assert_allclose(jax.jit(matmul)(jnp.asarray(x), matrix), np.float64(x) @ np.float64(found), atol=2e-5)
    again = assembled(described(matrix), arrays(matrix))
    assert jax.tree.structure(again) == jax.tree.structure(matrix)
    with pytest.raises(ValueError, match="arrays: got"):
        assembled(described(matrix), arrays(matrix) | {"order": order[:-1]})


@pytest.mark.parametrize(
    ("form", "order", "said"),
    [
        (WeightFormat("bitmap", 32), np.arange(8), "order: got one for bitmap, expected a pattern N:M"),
        (WeightFormat("2:4", 32), np.zeros(8, int), "order: got 8 places, expected each of 8 inputs once"),
        (WeightFormat("2:4", 32), np.arange(4), "order: got 4 places, expected each of 8 inputs once"),
    ],
)
def test_what_is_no_order_is_refused(form, order, said):
    with pytest.raises(ValueError, match=said):
        encode(pruned(8, 1, "2:4"), form, order)


@pytest.mark.parametrize("kind", ["dense", "bitmap", "2:4"])
def test_a_matrix_is_its_facts_and_arrays(kind):
    matrix = encode(pruned(72, 21, kind), WeightFormat(kind, 4, 24))
    again = assembled(described(matrix), arrays(matrix))
    assert jax.tree.structure(again) == jax.tree.structure(matrix)
    np.testing.assert_array_equal(np.asarray(again.dense()), np.asarray(matrix.dense()))


def test_large_weights_are_rounded_and_no_numbers_refused():
    kernel = np.full((64, 2), 1e38, np.float32)
    np.testing.assert_allclose(encode(kernel, WeightFormat("dense", 4, 32)).dense(), kernel, rtol=2**-7)
    for bad in (np.nan, np.inf):
        kernel[3, 1] = bad
        with pytest.raises(ValueError, match="got NaN or infinity"):
            encode(kernel, WeightFormat("dense", 8))


def test_numpy_rows_are_multiplied_too():
    kernel = pruned(72, 21, "bitmap")
    x = np.ones((2, 72), np.float32)
    np.testing.assert_allclose(x @ encode(kernel, WeightFormat("bitmap", 32)), x @ kernel, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kind": "2:x"}, "kind: got '2:x'"),
        ({"inputs": 128}, "arrays: got"),
        ({"inputs": "many"}, "arrays: got"),
        ({"group": 0}, "arrays: got"),
        ({"speed": 3}, "arrays: got"),
    ],
)
def test_facts_that_do_not_fit_are_refused(change, said):
    matrix = encode(pruned(72, 21, "2:4"), WeightFormat("2:4", 8, 24))
    with pytest.raises(ValueError, match=said):
        assembled({**described(matrix), **change}, arrays(matrix))


def test_what_cannot_be_is_said():
    kernel = np.ones((8, 2), np.float32)
    with pytest.raises(ValueError, match=r"2:4: got 4 weights that are not zero among 4 inputs"):
        encode(kernel, WeightFormat("2:4", 32))
    with pytest.raises(ValueError, match="multiple of 3"):
        encode(kernel, WeightFormat("1:3", 32))
    with pytest.raises(ValueError, match=r"bits: got 16, expected the 32 of float32"):
        encode(kernel, WeightFormat("dense", 16))
    with pytest.raises(ValueError, match="expected dense, bitmap or N:M"):
        WeightFormat("4:4")
    with pytest.raises(ValueError, match="expected 8 on the last axis"):
        matmul(jnp.ones((1, 7)), encode(kernel, WeightFormat("dense", 32)))
    with pytest.raises(ValueError, match="expected one of"):
        matmul(jnp.ones((1, 8)), encode(kernel, WeightFormat("dense", 32)), backend="abacus")
