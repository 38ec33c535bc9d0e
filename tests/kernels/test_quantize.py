"""The laws of group-wise rounding and packing, against a NumPy derivation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kernels import quantize

AXES = ("tokens", "channels")


@pytest.mark.parametrize("bits", quantize.PACKED_BITS)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_unpack_undoes_pack(bits, data):
    shape = (*data.draw(hnp.array_shapes(max_dims=3, max_side=4)), data.draw(st.integers(1, 5)) * 8 // bits)
    codes = data.draw(hnp.arrays(np.uint8, shape, elements=st.integers(0, 2**bits - 1)))
    words = quantize.pack(jnp.asarray(codes), bits)
    assert words.shape[-1] * 8 == shape[-1] * bits
    np.testing.assert_array_equal(quantize.unpack(words, bits), codes)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@given(
    x=hnp.arrays(np.float32, (1, 2, 8, 16), elements=st.floats(-1e3, 1e3, width=32)),
    offset=st.floats(-100, 100),
)
@settings(max_examples=25, deadline=None)
def test_error_is_at_most_half_a_scale(axis, bits, x, offset):
    grouped = quantize.split_groups(jnp.asarray(x + np.float32(offset)), 8, axis)
    encoded = quantize.encode(grouped, bits, axis)
    error = np.abs(np.float64(quantize.decode(encoded)) - np.float64(grouped))
    slack = 1e-6 * np.abs(np.float64(grouped)).max() + 1e-37  # float32 arithmetic, which flushes subnormals
    assert np.all(error <= np.float64(encoded.scale) / 2 + slack)
    assert encoded.codes.min() >= 0
    assert encoded.codes.max() <= 2**bits - 1


@pytest.mark.parametrize("value", [0.0, -2.5, 3.0])
def test_a_constant_group_is_exact(value):
    x = jnp.full((1, 1, 4, 4), value)
    encoded = quantize.encode(quantize.split_groups(x, 4, "tokens"), 2, "tokens")
    assert float(jnp.abs(encoded.scale).max()) == 0
    np.testing.assert_array_equal(quantize.round_groups(x, 2, 4, "tokens"), x)


@pytest.mark.parametrize("axis", AXES)
def test_groups_follow_the_axis(axis):
    """Keys share a scale among tokens of a channel, values among channels of a token: KIVI, section 3."""
    x = np.random.default_rng(0).standard_normal((2, 3, 8, 16)).astype(np.float32)
    encoded = quantize.encode(quantize.split_groups(jnp.asarray(x), 4, axis), 4, axis)
    groups = x.reshape(2, 3, 2, 4, 16) if axis == "tokens" else x.reshape(2, 3, 8, 4, 4)
    member = 3 if axis == "tokens" else 4
    scale = (groups.max(member, keepdims=True) - groups.min(member, keepdims=True)) / 15
    np.testing.assert_allclose(np.float32(encoded.scale), scale, rtol=2e-3)
    np.testing.assert_allclose(np.float32(encoded.zero), groups.min(member, keepdims=True), rtol=2e-3, atol=1e-6)
    codes = np.round((groups - groups.min(member, keepdims=True)) / scale)
    assert np.mean(np.asarray(encoded.codes) != codes) < 0.02  # float16 metadata moves few values to a neighbour


def test_traced_bits_need_one_program():
    traces = []

    @jax.jit
    def round_to(x, bits):
        traces.append(bits)
        return quantize.round_groups(x, bits, 8, "tokens")

    x = jnp.asarray(np.random.default_rng(1).standard_normal((1, 1, 8, 4)), jnp.float32)
    errors = [float(jnp.abs(round_to(x, bits) - x).max()) for bits in (2, 4, 8, 16)]
    assert len(traces) == 1
    assert errors[0] > errors[1] > errors[2] > errors[3] == 0
