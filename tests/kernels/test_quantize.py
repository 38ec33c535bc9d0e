"""The laws of group-wise rounding, against a NumPy derivation."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kernels import codebook, quantize
from kernels.quantize import PACKED_BITS, Quantizer

AXES = ("tokens", "channels")
OPTIONS = [
    {},
    {"clip": True},
    {"metadata": "float8"},
    {"codebook": "normal"},
    {"clip": True, "metadata": "float8"},
    {"codebook": "normal", "metadata": "float8"},
]


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def rms(x):
    return float(jnp.sqrt(jnp.mean(jnp.square(x))))


@pytest.mark.parametrize("kind", ["float16", "float8"])
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("bits", PACKED_BITS)
@given(x=hnp.arrays(np.float32, (1, 2, 8, 16), elements=st.floats(-200, 200, width=32)), offset=st.floats(-100, 100))
@settings(max_examples=15, deadline=None)
def test_error_is_at_most_half_a_step(kind, axis, bits, x, offset):
    quantizer = Quantizer(axis, 8, metadata=kind)
    grouped = quantizer.split(jnp.asarray(x + np.float32(offset)))
    encoded = quantize.encode(grouped, bits, quantizer)
    error = np.abs(np.float64(quantize.decode(encoded, bits, quantizer)) - np.float64(grouped))
    slack = 1e-6 * np.abs(np.float64(grouped)).max() + 1e-37  # float32 arithmetic, which flushes subnormals
    high = np.float64(grouped).max(quantizer.member, keepdims=True)
    held = np.float64(encoded.zero) + np.float64(encoded.span) >= high - slack
    assert np.all((error <= np.float64(encoded.span) / (2**bits - 1) / 2 + slack) | ~held)
    assert held.all() or kind == "float8"  # whose range ends at 448
    assert encoded.codes.min() >= 0
    assert encoded.codes.max() <= 2**bits - 1


@pytest.mark.parametrize("value", [0.0, -2.5, 3.0])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_constant_group_is_exact(value, options):
    x, quantizer = jnp.full((1, 1, 4, 4), value), Quantizer("tokens", 4, **options)
    encoded = quantize.encode(quantizer.split(x), 2, quantizer)
    assert float(jnp.abs(encoded.span.astype(jnp.float32)).max()) == 0
    np.testing.assert_array_equal(quantize.round_groups(x, 2, quantizer), x)


@pytest.mark.parametrize("axis", AXES)
def test_groups_follow_the_axis(axis):
    """Keys share a scale among tokens of a channel, values among channels of a token: KIVI, section 3."""
    x, quantizer = np.asarray(normal(2, 3, 8, 16)), Quantizer(axis, 4)
    encoded = quantize.encode(quantizer.split(jnp.asarray(x)), 4, quantizer)
    groups = x.reshape(2, 3, 2, 4, 16) if axis == "tokens" else x.reshape(2, 3, 8, 4, 4)
    member = 3 if axis == "tokens" else 4
    low, high = groups.min(member, keepdims=True), groups.max(member, keepdims=True)
    np.testing.assert_allclose(np.float32(encoded.span), high - low, rtol=2e-3)
    np.testing.assert_allclose(np.float32(encoded.zero), low, rtol=2e-3, atol=1e-6)
    codes = np.round((groups - low) / ((high - low) / 15))
    assert np.mean(np.asarray(encoded.codes) != codes) < 0.02  # float16 metadata moves few values to a neighbour


@pytest.mark.parametrize("options", OPTIONS)
def test_traced_bits_need_one_program_and_give_the_same_numbers(options):
    traces, quantizer = [], Quantizer("tokens", 8, **options)

    @jax.jit
    def round_to(x, bits):
        traces.append(bits)
        return quantize.round_groups(x, bits, quantizer)

    x = normal(1, 2, 64, 4, seed=1)
    errors = []
    for bits in (2, 3, 4, 6, 8, 16):
        rounded = round_to(x, bits)
        np.testing.assert_allclose(rounded, quantize.round_groups(x, bits, quantizer), rtol=1e-6, atol=1e-6)
        errors.append(rms(rounded - x))
    assert len(traces) == 1
    assert sorted(errors, reverse=True) == errors
    assert errors[-1] == 0


@pytest.mark.parametrize(("bits", "gain"), [(2, 0.82), (3, 0.95), (4, 0.99)])
@pytest.mark.parametrize("kind", ["float16", "float8"])
def test_clipping_loses_less_and_never_more(bits, gain, kind):
    x = normal(2, 2, 256, 64, seed=2)
    plain = Quantizer("tokens", 32, metadata=kind)
    clipped = dataclasses.replace(plain, clip=True)
    errors = [
        jnp.sum(jnp.square(quantizer.split(quantize.round_groups(x, bits, quantizer) - x)), quantizer.member)
        for quantizer in (plain, clipped)
    ]
    assert bool(jnp.all(errors[1] <= errors[0] * (1 + 1e-5)))
    assert float(jnp.sqrt(errors[1].sum() / errors[0].sum())) < gain


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_codebook_is_the_fixed_point_of_lloyds_rule(bits):
    """Each level is the mean of the normal values nearest to it: E[x | a < x < b] = (p(a) - p(b)) / (P(b) - P(a))."""
    levels = np.float64(codebook.LEVELS[bits][: 1 << bits])
    borders = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
    density = np.exp(-np.square(borders) / 2) / math.sqrt(2 * math.pi)
    share = np.array([(1 + math.erf(border / math.sqrt(2))) / 2 for border in borders])
    np.testing.assert_allclose(levels, (density[:-1] - density[1:]) / (share[1:] - share[:-1]), atol=2e-3)


def test_the_codebooks_error_is_lloyd_maxs():
    """Max (1960), table I: mean squared error .1175 and .03454 at 2 and 3 bits."""
    x = normal(4, 4, 64, 128, seed=3)
    for bits, error in ((2, 0.1175), (3, 0.03454)):
        rounded = quantize.round_groups(x, bits, Quantizer("channels", 128, codebook="normal"))
        assert rms(rounded - x) == pytest.approx(math.sqrt(error), rel=0.02)


@pytest.mark.parametrize("mean", [0, 20, 100, 400])
def test_a_codebook_survives_coarse_metadata(mean):
    """A mean that float8 rounds coarsely widens the span; nothing leaves float8's range as NaN."""
    x = normal(1, 1, 64, 64, seed=4) + mean
    rounded = quantize.round_groups(x, 4, Quantizer("channels", 64, codebook="normal", metadata="float8"))
    assert rms(rounded - x) < 0.12 + 0.02 * mean
    assert bool(jnp.isfinite(quantize.round_groups(x * 600, 4, Quantizer("channels", 64, codebook="normal"))).all())
