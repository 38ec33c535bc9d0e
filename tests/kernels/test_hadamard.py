"""The rotation: orthogonal, its own inverse, fast = its matrix, and good at spreading one outlier."""

import jax.numpy as jnp
import numpy as np
import pytest

from kernels import hadamard


@pytest.mark.parametrize("dim", [1, 2, 7, 8, 40, 64, 80, 96, 128])
def test_the_fast_transform_is_its_matrix_and_undoes_itself(dim):
    x = np.random.default_rng(dim).standard_normal((3, dim)).astype(np.float32)
    turned = hadamard.rotate(jnp.asarray(x))
    np.testing.assert_allclose(turned, x @ hadamard.matrix(dim), atol=2e-6)
    np.testing.assert_allclose(hadamard.rotate(turned), x, atol=2e-6)
    np.testing.assert_allclose(hadamard.matrix(dim) @ hadamard.matrix(dim).T, np.eye(dim), atol=1e-12)


def test_a_power_of_two_gives_the_walsh_matrix():
    """Sylvester's construction: H_2n = [[H, H], [H, -H]] / sqrt 2."""
    h = hadamard.matrix(4)
    np.testing.assert_allclose(h * 2, [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]])


@pytest.mark.parametrize("dim", [64, 96])
def test_an_outlier_is_spread_over_all_channels(dim):
    x = jnp.zeros(dim).at[5].set(1.0)
    assert float(jnp.abs(hadamard.rotate(x)).max()) < 0.4
