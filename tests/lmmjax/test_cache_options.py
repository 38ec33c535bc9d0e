"""Every option of a cache's format, at the model: one rule for all cuts, the same numbers as the search's cache."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import CONFIG as TWO_LAYERS
from small import encoded

from lmmjax import llava
from lmmjax.cache import Cache, cache_bytes, empty_cache, empty_search_cache
from lmmjax.errors import InputError
from lmmjax.fold import fold_values
from lmmjax.plan import CacheFormat, LayerPlan, Plan, uniform

pytestmark = pytest.mark.slow

FORM = CacheFormat(group=4, dtype="float32")
# One layer, for each is traced and compiled in every format anew; that layers differ is test_cache.py's matter.
CONFIG = dataclasses.replace(TWO_LAYERS, text=dataclasses.replace(TWO_LAYERS.text, layers=1))
LENGTHS = jnp.asarray([16, 11])
CUTS = (5, *[1] * 6, 5)
"""Pieces of a prompt of 16: at its beginning and at its end several tokens, neither at the border of a group of 4."""
APART = {"visual_key_bits": 2, "visual_value_bits": 6}
OPTIONS = {
    "plain": ({}, {}),
    "sinks": ({"sinks": 2}, {}),
    "before RoPE": ({"keys": "before_rope"}, {}),
    "keys rotated": ({"rotate_keys": True}, {}),
    "values rotated": ({"rotate_values": "online"}, {}),
    "clipped": ({"clip": True}, {}),
    "float8": ({"metadata": "float8"}, {}),
    "codebook": ({"codebook": "normal"}, {}),
    "keys by token": ({"key_axis": "channels", "value_group": 8}, {}),
    "image tokens apart": ({}, APART),
    "image values by channel": ({"visual_values": "tokens"}, {}),
    "all at once": (
        {
            "sinks": 1,
            "window": 4,
            "visual_values": "tokens",
            "clip": True,
            "metadata": "float8",
            "rotate_keys": True,
            "rotate_values": "online",
        },
        APART,
    ),
}

STRUCTURES = ("plain", "sinks", "before RoPE", "keys by token", "image tokens apart", "all at once")
"""Those whose stores differ in more than their codes."""


def plan_of(name: str, bits: tuple[int, int] = (4, 3)) -> Plan:
    form, apart = OPTIONS[name]
    return Plan((LayerPlan(*bits, **apart),), cache=dataclasses.replace(FORM, **form)).check(CONFIG.text)


@pytest.fixture(scope="module")
def params():
    return llava.init(CONFIG, jax.random.key(0))


@pytest.fixture(scope="module")
def prompt(params):
    """Embeddings of two prompts of unequal length, and which are image tokens."""
    samples = encoded(2, seed=4)
    tokens = jnp.asarray(samples.tokens)
    images = llava.encode_images(CONFIG, params, jnp.asarray(samples.pixels))
    return llava.embed(CONFIG, params, tokens, images), llava.image_tokens(CONFIG, tokens, LENGTHS)


extend = jax.jit(llava.extend, static_argnums=(0, 5))
crop = jax.jit(Cache.crop)


def feed(params, cache: Cache, prompt, cuts, lengths=LENGTHS):
    """Returns the states of all positions after the prompt went in piece by piece, and the cache."""
    (x, visual), states, start = prompt, [], 0
    for cut in cuts:
        counts, piece = jnp.clip(lengths - start, 0, cut), slice(start, start + cut)
        out, cache = extend(CONFIG, params, cache, x[:, piece], counts, None, visual[:, piece])
        states.append(out)
        start += cut
    return jnp.concatenate(states, 1), cache


def assert_close(a, b, **tolerance):
    for row, length in enumerate((16, 11)):
        np.testing.assert_allclose(a[row, :length], b[row, :length], **tolerance)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_prefill_equals_decoding_step_by_step(name, params, prompt):
    plan = plan_of(name)
    whole, _ = feed(params, empty_cache(CONFIG.text, plan, 2, 24, images=4), prompt, [16])
    parts, _ = feed(params, empty_cache(CONFIG.text, plan, 2, 24, images=4), prompt, CUTS)
    # A last-bit difference of a K or V can move a code by one, hence no tighter.
    assert_close(whole, parts, rtol=2e-3, atol=5e-3)


@pytest.mark.parametrize("name", OPTIONS)
def test_bits_as_data_give_the_packed_numbers(name, params, prompt):
    plan = plan_of(name)
    sides = [
        jnp.asarray([getattr(layer, side) for layer in plan.layers]) if getattr(plan.layers[0], side) else None
        for side in ("key_bits", "value_bits", "visual_key_bits", "visual_value_bits")
    ]
    rounded = empty_search_cache(CONFIG.text, plan.cache, sides[0], sides[1], 2, 24, *sides[2:])
    packed = empty_cache(CONFIG.text, plan, 2, 24, images=4)
    a, b = (feed(params, cache, prompt, [16])[0] for cache in (packed, rounded))
    assert_close(a, b, rtol=2e-3, atol=5e-3)
    assert float(jnp.median(jnp.abs(a[0] - b[0]))) < 1e-5


@pytest.mark.parametrize("name", OPTIONS)
def test_predicted_bytes_are_the_buffers_bytes(name):
    plan = plan_of(name)
    cache = empty_cache(CONFIG.text, plan, 3, 18, images=4)
    real = sum(leaf.nbytes for leaf in jax.tree.leaves(cache.layers))
    sizes = [sum(store.sizes.values()) for layer in cache.layers for store in layer]
    assert real == cache.nbytes == sum(sizes) == cache_bytes(CONFIG.text, plan, 3, 18, images=4)


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_does_something_and_wide_codes_do_little(name, params, prompt):
    """At 8 bits all formats are near the dense model; at 2 to 4 bits each has an error of its own."""
    dense, _ = feed(params, empty_cache(CONFIG.text, uniform(CONFIG.text, cache=FORM), 2, 16), prompt, [16])
    wide = plan_of(name, (8, 8))
    wide = dataclasses.replace(
        wide,
        layers=tuple(dataclasses.replace(x, visual_key_bits=None, visual_value_bits=None) for x in wide.layers),
    )
    near, _ = feed(params, empty_cache(CONFIG.text, wide, 2, 24, images=4), prompt, [16])
    coarse = {"metadata": "float8"}.items() <= OPTIONS[name][0].items()
    assert_close(near, dense, rtol=0.1, atol=0.2 if coarse else 0.1)
    if name != "plain":
        ours, plain = (
            feed(params, empty_cache(CONFIG.text, plan_of(which), 2, 24, images=4), prompt, [16])[0]
            for which in (name, "plain")
        )
        assert float(jnp.abs(ours[0] - plain[0]).max()) > 1e-4


def test_a_rotation_folded_into_the_weights_is_the_one_made_online(params, prompt):
    """And without rounding it changes nothing; folded twice the weights are as they were."""
    folded = fold_values(CONFIG.text, params)
    online, fold = (
        dataclasses.replace(uniform(CONFIG.text, bits=3), cache=dataclasses.replace(FORM, rotate_values=how))
        for how in ("online", "folded")
    )
    a, _ = feed(params, empty_cache(CONFIG.text, online, 2, 16), prompt, [16])
    b, _ = feed(folded, empty_cache(CONFIG.text, fold, 2, 16), prompt, [16])
    assert_close(a, b, rtol=2e-3, atol=5e-3)
    exact = empty_cache(CONFIG.text, uniform(CONFIG.text, cache=FORM), 2, 16)
    assert_close(feed(folded, exact, prompt, [16])[0], feed(params, exact, prompt, [16])[0], rtol=1e-4, atol=1e-4)
    for twice, once in zip(jax.tree.leaves(fold_values(CONFIG.text, folded)), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(twice, once, atol=1e-6)


def test_a_folded_rotation_is_refused_on_pruned_values():
    plan = uniform(CONFIG.text, drop={"q": 0, "k": 0, "v": 4, "o": 0, "gate": 0, "up": 0, "down": 0})
    with pytest.raises(InputError, match=r"rotate_values folded fills again; use online"):
        dataclasses.replace(plan, cache=CacheFormat(rotate_values="folded")).check(CONFIG.text)


@pytest.mark.parametrize("name", STRUCTURES)
def test_beams_are_rows_of_the_cache(name, params, prompt):
    """Reordered rows go on as their originals do."""
    _, cache = feed(params, empty_cache(CONFIG.text, plan_of(name), 2, 24, images=4), prompt, [5, 5, 5])
    at, counts = jnp.asarray([1, 0, 1]), jnp.asarray([5, 3])
    x, visual = jax.random.normal(jax.random.key(1), (2, 5, CONFIG.text.width)), jnp.zeros((2, 5), bool)
    expected, _ = extend(CONFIG, params, cache, x, counts, None, visual)
    got, _ = extend(CONFIG, params, cache.rows(at), x[at], counts[at], None, visual[at])
    for row, original in enumerate(at.tolist()):
        count = (5, 3)[original]
        np.testing.assert_allclose(got[row, :count], expected[original, :count], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", STRUCTURES)
def test_a_cropped_cache_goes_on(name, params, prompt):
    """Cut back to a beginning and fed the rest again, it ends near where it would have: rounded tokens stay so."""
    cache = empty_cache(CONFIG.text, plan_of(name, (8, 8)), 2, 24, images=4)
    whole, cache = feed(params, cache, prompt, [16])
    kept = jnp.asarray([13, 7])
    cropped = crop(cache, kept)
    np.testing.assert_array_equal(cropped.lengths, kept)
    x, visual = prompt
    rest = jnp.take_along_axis(x, (kept[:, None] + jnp.arange(3))[..., None], axis=1)
    own = jnp.take_along_axis(visual, kept[:, None] + jnp.arange(3), axis=1)
    again, _ = extend(CONFIG, params, cropped, rest, jnp.asarray([3, 3]), None, own)
    tolerance = 0.35 if "float8" in OPTIONS[name][0].values() or "visual_key_bits" in OPTIONS[name][1] else 0.05
    for row, n in enumerate((13, 7)):
        assert float(jnp.abs(again[row] - whole[row, n : n + 3]).max()) < tolerance


def test_a_full_cache_says_so():
    cache = empty_cache(CONFIG.text, plan_of("plain"), 2, 16).replace(lengths=jnp.asarray([16, 3]))
    unready = empty_cache(CONFIG.text, plan_of("image tokens apart"), 1, 16)
    with pytest.raises(InputError, match="made without room for any"):
        unready.check_room([4], [4])
    cache.check_room([0, 13])
    with pytest.raises(InputError, match="cache: full: it has room for 16 tokens a row, 17 would be there"):
        cache.check_room([1, 0])
    apart = empty_cache(CONFIG.text, plan_of("image tokens apart"), 2, 16, images=4)
    apart.check_room([16, 2], [4, 0])
    with pytest.raises(InputError, match="room for 4 image tokens a row, 5 would be there"):
        apart.check_room([6, 0], [5, 0])
    with pytest.raises(InputError, match="a row lacks room for 1 tokens of text"):
        apart.check_room([16, 0], [3, 0])
