"""Matrices joined: bit by bit the outputs of each, on every format that kernels read; what is unlike stays apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.gpu.weights.arrange import arranged
from kernels.weights import WeightFormat, encode
from kernels.weights.join import joined
from kernels.weights.matmul import matmul

FORMS = [
    *(WeightFormat(kind, bits) for kind in ("dense", "bitmap", "2:4", "4:8") for bits in (32, 8)),
    *(WeightFormat(kind, 4, 64) for kind in ("dense", "bitmap", "2:4")),
]
OUTPUTS = (64, 128, 64)


def matrices(form: WeightFormat, outputs=OUTPUTS, inputs: int = 192) -> list:
    """Returns matrices of one format; a row of the first is empty where it may be."""
    found = []
    for seed, count in enumerate(outputs):
        w = np.random.default_rng(seed).standard_normal((inputs, count)).astype(np.float32)
        n, m = form.pattern or (1, 2)
        w *= (np.abs(w).reshape(-1, m, count).argsort(1).argsort(1) >= m - n).reshape(w.shape) | (form.kind == "dense")
        if seed == 0:
            w[:, 3] = 0
            w[5, 4] = 0  # an odd number of weights, whose int4 codes are filled up
        found.append(jax.tree.map(jnp.asarray, encode(w, form)))
    return found


@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form.kind}-{form.bits}")
def test_outputs_are_those_of_each(form):
    apart = matrices(form)
    one = jax.jit(joined)(apart)
    assert one.shape == (192, sum(OUTPUTS))
    assert one.kept == sum(matrix.kept for matrix in apart)
    np.testing.assert_array_equal(one.rows(), np.concatenate([matrix.rows() for matrix in apart]))
    x = jnp.asarray(np.random.default_rng(9).standard_normal((3, 192)), jnp.bfloat16)
    np.testing.assert_array_equal(matmul(x, one), jnp.concatenate([matmul(x, matrix) for matrix in apart], 1))


@pytest.mark.parametrize("form", [form for form in FORMS if form.kind in ("dense", "2:4") and form.bits < 16])
def test_what_kernels_of_gpus_read_is_what_they_would_make_of_the_whole(form):
    apart = matrices(form)
    found, expected = joined([arranged(matrix) for matrix in apart]), arranged(joined(apart))
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_what_is_unlike_stays_apart():
    eight, four = matrices(WeightFormat("dense", 8)), matrices(WeightFormat("dense", 4, 64))
    assert joined([eight[0], four[0]]) is None
    assert joined([eight[0], matrices(WeightFormat("2:4", 8))[0]]) is None
    assert joined([eight[0], matrices(WeightFormat("dense", 8), inputs=128)[0]]) is None
    first, second, _ = matrices(WeightFormat("dense", 32))
    assert joined([first, second.replace(values=second.values.astype(jnp.bfloat16))]) is None


def test_orders_of_inputs_stay_apart():
    """Each output of one product would read x in the order of its own matrix."""
    first, second, _ = matrices(WeightFormat("2:4", 8))
    ordered = [one.replace(order=jnp.arange(192)[::-1]) for one in (first, second)]
    for alike in (ordered, [arranged(one) for one in ordered]):
        assert joined(alike) is None


def test_blocks_of_rows_that_are_filled_up_stay_apart():
    assert joined([arranged(matrix) for matrix in matrices(WeightFormat("dense", 8), (64, 60))]) is None


def test_plain_kernels_lie_side_by_side():
    first, second = jnp.ones((4, 2)), jnp.zeros((4, 3))
    np.testing.assert_array_equal(joined([first, second]), jnp.concatenate([first, second], 1))
    assert joined([first, second.astype(jnp.bfloat16)]) is None
    assert joined([first, matrices(WeightFormat("dense", 8))[0]]) is None
