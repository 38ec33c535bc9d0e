"""The append op: which backend takes a store, an explicit choice, and parts that each go where they belong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import append as op
from kernels.cases import Case
from kernels.gpu import device
from kernels.stores import Dense

CASE = Case(
    (4, 4), (1, 1, 16), (20, 9), 32, group=16, value_group=16, sinks=2, visual=(2, 16), images=(4, 12), window=16
)
STARTS, COUNTS = jnp.asarray([3, 0]), jnp.asarray([5, 4])


def new(t: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(t).standard_normal((2, 1, t, 16)), jnp.bfloat16)


@pytest.mark.parametrize("side", [0, 1])
def test_every_part_is_appended_to_as_the_store_would(side: int):
    """Interpreted: packed parts by the kernel, sinks and exact image tokens by their own append."""
    store, visual = CASE.stores()[side], CASE.is_image()

    @jax.jit
    def both(x: jax.Array):
        with device.speaking_of(device.EMULATED):
            return op.append(store, x, STARTS, COUNTS, visual), store.append(x, STARTS, COUNTS, visual)

    own, expected = both(new(5))
    for x, y in zip(jax.tree.leaves(own), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))


def test_an_explicit_choice_never_falls_back():
    packed, dense = (
        Case((4, 4), (1, 1, 16), (2, 2), 32, group=16, value_group=16).stores()[0],
        Dense.empty((2, 1, 32, 16), jnp.float32),
    )
    with pytest.raises(ValueError, match="expected one of triton, reference"):
        op.append(packed, new(1), STARTS, COUNTS, backend="fast")
    with device.speaking_of(device.EMULATED), pytest.raises(ValueError, match=r"'triton' cannot .* no Dense store"):
        op.append(dense, new(1), STARTS, COUNTS, backend="triton")
    old = device.Device((7, 5), 68)
    with device.speaking_of(old), pytest.raises(ValueError, match=r"compute capability 8\.0"):
        op.append(packed, new(1), STARTS, COUNTS, backend="triton")
    assert op.append(dense, new(1), STARTS, COUNTS).values.shape == dense.values.shape
