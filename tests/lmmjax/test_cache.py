"""The model over its cache: prefill equals step by step, bytes are what they are said to be, bits are data."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import CONFIG, encoded

from lmmjax import llava
from lmmjax.cache import cache_bytes, empty_cache, empty_search_cache
from lmmjax.plan import BITS, CacheFormat, LayerPlan, Plan, uniform

FORM = CacheFormat(group=4, window=0, dtype="float32")
MIXED = Plan((LayerPlan(8, 2), LayerPlan(16, 4)), cache=FORM)
# Where layers are alike one is enough: each is traced and compiled anew.
ONE = dataclasses.replace(CONFIG, text=dataclasses.replace(CONFIG.text, layers=1))


@pytest.fixture(scope="module")
def params():
    return llava.init(CONFIG, jax.random.key(0))


@pytest.fixture(scope="module")
def one():
    return llava.init(ONE, jax.random.key(0))


@pytest.fixture(scope="module")
def prompt(params):
    """Embeddings of two prompts of unequal length, padded on the right."""
    samples = encoded(2, seed=4)
    images = llava.encode_images(CONFIG, params, jnp.asarray(samples.pixels))
    return llava.embed(CONFIG, params, jnp.asarray(samples.tokens), images), jnp.asarray([16, 11])


extend = jax.jit(llava.extend, static_argnums=0)


def step_by_step(params, cache, x, lengths, cuts):
    states, start = [], 0
    for cut in cuts:
        out, cache = extend(CONFIG, params, cache, x[:, start : start + cut], jnp.clip(lengths - start, 0, cut))
        states.append(out)
        start += cut
    return jnp.concatenate(states, 1), cache


@pytest.mark.parametrize(
    ("plan", "window"),
    [(uniform(CONFIG.text, cache=FORM), 0), (MIXED, 0), (MIXED, 4), (uniform(CONFIG.text, bits=2, cache=FORM), 4)],
)
def test_a_prefill_equals_decoding_step_by_step(plan, window, params, prompt):
    """States and logits, at any cut: queries see what was rounded when the row was that long."""
    x, lengths = prompt
    plan = dataclasses.replace(plan, cache=dataclasses.replace(FORM, window=window))
    whole, _ = extend(CONFIG, params, empty_cache(CONFIG.text, plan, 2, 20), x, lengths)
    parts, cache = step_by_step(params, empty_cache(CONFIG.text, plan, 2, 20), x, lengths, [5, *[1] * 6, 5])
    np.testing.assert_array_equal(cache.lengths, lengths)
    for row, length in enumerate((16, 11)):
        # A last-bit difference of a K or V can move a code by one, hence no tighter than a step of 8 bits.
        np.testing.assert_allclose(whole[row, :length], parts[row, :length], rtol=2e-3, atol=5e-3)


@pytest.mark.parametrize("bits", BITS)
def test_bits_as_data_give_the_packed_numbers(bits, one, prompt):
    x, lengths = prompt
    packed = empty_cache(ONE.text, uniform(ONE.text, bits=bits, cache=FORM), 2, 16)
    rounded = empty_search_cache(ONE.text, FORM, jnp.full(1, bits), jnp.full(1, bits), 2, 16)
    a, _ = extend(ONE, one, packed, x, lengths)
    b, _ = extend(ONE, one, rounded, x, lengths)
    np.testing.assert_allclose(a[0], b[0], rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(a[1, :11], b[1, :11], rtol=2e-5, atol=2e-5)


def test_new_bits_compile_nothing(params, prompt):
    x, lengths = prompt
    traces = []

    @jax.jit
    def run(key_bits, value_bits):
        traces.append(1)
        cache = empty_search_cache(CONFIG.text, FORM, key_bits, value_bits, 2, 16)
        return llava.extend(CONFIG, params, cache, x, lengths)[0]

    results = [
        run(jnp.asarray(k), jnp.asarray(v)) for k, v in (([16, 16], [16, 16]), ([2, 8], [4, 2]), ([4, 4], [8, 8]))
    ]
    assert len(traces) == 1
    assert float(jnp.abs(results[0] - results[1]).max()) > 1e-3


def test_prefill_may_be_left_unrounded(one, prompt):
    """With the switch off a prompt's states are the dense model's, and the cache it leaves is the same."""
    x, lengths = prompt
    dense, _ = extend(ONE, one, empty_cache(ONE.text, uniform(ONE.text, cache=FORM), 2, 16), x, lengths)
    plan = uniform(ONE.text, bits=2, cache=dataclasses.replace(FORM, quantize_prefill=False))
    off, _ = extend(ONE, one, empty_cache(ONE.text, plan, 2, 16), x, lengths)
    on, _ = extend(ONE, one, empty_cache(ONE.text, uniform(ONE.text, bits=2, cache=FORM), 2, 16), x, lengths)
    np.testing.assert_allclose(off[0], dense[0], rtol=1e-4, atol=1e-5)
    assert float(jnp.abs(on[0] - dense[0]).max()) > 1e-2


@pytest.mark.parametrize("plan", [uniform(CONFIG.text, bits=bits, cache=FORM) for bits in BITS])
def test_predicted_bytes_are_the_buffers_bytes(plan):
    cache = empty_cache(CONFIG.text, plan, 3, 18)
    real = sum(leaf.nbytes for leaf in jax.tree.leaves(cache.layers))
    bits, text, group = plan.layers[0].key_bits, CONFIG.text, 4
    rows, capacity, d = 3 * text.kv_heads, 20, text.head_dim
    dense = capacity * d * 4
    planes = {16: (), 8: (8,), 6: (4, 2), 4: (4,), 3: (2, 1), 2: (2,)}[bits]
    words = sum(capacity * -(-d // (16 // width)) + d * -(-capacity // (16 // width)) for width in planes)
    ring = group * d * 4  # of keys alone: values settle token by token
    keys, values = capacity // group * d * 4, capacity * (d // group) * 4
    formula = 2 * dense if bits == 16 else 2 * words + ring + keys + values
    assert real == cache.nbytes == cache_bytes(text, plan, 3, 18) == text.layers * rows * formula
