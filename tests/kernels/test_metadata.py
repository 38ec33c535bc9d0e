"""Metadata is rounded outwards: against all numbers that its kind has."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from kernels import metadata

KINDS = {"float16": np.float16, "float8": ml_dtypes.float8_e4m3fn}


@pytest.mark.parametrize("kind", KINDS)
def test_the_next_number_on_the_right_side_is_taken(kind):
    size = np.dtype(KINDS[kind]).itemsize
    every = np.arange(2 ** (8 * size), dtype=f"u{size}").view(KINDS[kind]).astype(np.float32)
    every = np.unique(every[np.isfinite(every)])
    rng = np.random.default_rng(0)
    x = rng.standard_normal(3000) * 10.0 ** rng.integers(-6, 6, 3000)
    x = np.concatenate([x, every[::7], [0, -0.0, 448, 449, -448, -449, 1e9, -1e9]]).astype(np.float32)
    below, above = (np.float32(f(jnp.asarray(x), kind)) for f in (metadata.at_most, metadata.at_least))
    np.testing.assert_array_equal(below, every[np.maximum(np.searchsorted(every, x, "right") - 1, 0)])
    np.testing.assert_array_equal(above, every[np.minimum(np.searchsorted(every, x, "left"), len(every) - 1)])
