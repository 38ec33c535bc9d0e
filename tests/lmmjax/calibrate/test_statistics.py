"""Statistics against sums over what a plain NumPy layer is fed, and traits against their definitions, pair by pair."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import CONFIG, encoded

from lmmjax import calibrate, llava
from lmmjax.calibrate import tokens, walk
from lmmjax.calibrate.layer import collect, forward
from lmmjax.calibrate.statistics import from_arrays, to_arrays
from lmmjax.data import Encoded
from lmmjax.linears import SHARED

LINEARS_FED = sorted(name for names in SHARED.values() for name in names)


@pytest.fixture(scope="module")
def params():
    return llava.init(CONFIG, jax.random.key(0))


@pytest.fixture(scope="module")
def rows(params):
    (batch,) = walk.embedded(CONFIG, params, encoded(3))
    return batch


def normed(x, eps=CONFIG.text.eps):
    x = np.float64(x)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)


def test_grams_are_the_means_of_outer_products_and_hold_the_mean_squares(params, rows):
    stats = calibrate.statistics(CONFIG, params, encoded(3), "text", grams=True)
    chosen = np.asarray(rows.valid & ~rows.visual)
    fed = normed(rows.x)[chosen]
    np.testing.assert_allclose(stats[0]["k"].gram, fed.T @ fed / len(fed), rtol=1e-4, atol=1e-5)
    light = calibrate.statistics(CONFIG, params, encoded(3), "text")
    for name, (whole, part) in itertools.product(LINEARS_FED, zip(stats, light, strict=True)):
        np.testing.assert_allclose(whole[name].x_sq, part[name].x_sq, rtol=1e-4)
        assert part[name].gram is None


def test_down_is_fed_what_gate_and_up_make(params, rows):
    """The last linear's statistics, through a layer written out once more."""
    layer = params["text"]["layers_0"]
    out = np.float64(forward(CONFIG.text, layer, rows))
    stats = calibrate.statistics(CONFIG, params, encoded(3))[0]
    # The stream behind attention is what the output has before down's product was added.
    gate, up, down = (np.float64(layer["mlp"][name]["kernel"]) for name in ("gate", "up", "down"))
    valid = np.asarray(rows.valid)
    middle = middle_of(layer, rows)
    fed = normed(middle)
    hidden = fed @ gate / (1 + np.exp(-fed @ gate)) * (fed @ up)
    np.testing.assert_allclose((middle + hidden @ down)[valid], out[valid], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(stats["down"].x_sq, (hidden[valid] ** 2).mean(0), rtol=1e-3)
    np.testing.assert_allclose(stats["gate"].x_sq, (fed[valid] ** 2).mean(0), rtol=1e-3)


def middle_of(layer, rows):
    """The stream between the sublayers: the layer's output with an MLP that adds nothing."""
    silent = {"down": {"kernel": jnp.zeros_like(layer["mlp"]["down"]["kernel"])}}
    return np.float64(forward(CONFIG.text, layer | {"mlp": layer["mlp"] | silent}, rows))


def test_traits_are_means_over_tokens_and_over_pairs_within_a_sequence(params, rows):
    layer = params["text"]["layers_0"]
    sums, out = collect(CONFIG.text, layer, rows, "all", False)
    traits = sums.statistics.traits
    x, out, middle = np.float64(rows.x), np.float64(out), middle_of(layer, rows)
    valid, visual = np.asarray(rows.valid), np.asarray(rows.visual)

    def off(a, b):
        return 1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    def drift(a, b):
        return np.mean([off(a[at], b[at]) for at in zip(*np.nonzero(valid), strict=True)])

    np.testing.assert_allclose(traits.attn_drift, drift(x, middle), rtol=1e-3)
    np.testing.assert_allclose(traits.mlp_drift, drift(middle, out), rtol=1e-3)
    text = valid & ~visual
    pairs = {"visual_spread": [], "text_spread": [], "cross_spread": []}
    for row in range(len(x)):
        for i, j in itertools.permutations(range(x.shape[1]), 2):
            kind = (visual[row, i] and visual[row, j], text[row, i] and text[row, j], visual[row, i] and text[row, j])
            for name, belongs in zip(pairs, kind, strict=True):
                pairs[name] += [off(out[row, i], out[row, j])] if belongs else []
    for name, values in pairs.items():
        np.testing.assert_allclose(getattr(traits, name), np.mean(values), rtol=1e-3, err_msg=name)


def test_drift_takes_text_and_the_visual_tokens_that_moved_most(rows):
    out = rows.x + jax.random.normal(jax.random.key(1), rows.x.shape)
    chosen = np.asarray(tokens.choose("drift", rows, out))
    x, out, visual = np.float64(rows.x), np.float64(out), np.asarray(rows.visual)
    text = np.asarray(rows.valid) & ~visual
    np.testing.assert_array_equal(chosen & text, text)
    drift = 1 - (x * out).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(out, axis=-1)
    taken = 0
    for row in range(len(x)):
        count = min(int(drift[row][visual[row]].mean() * text[row].sum()), visual[row].sum())
        most = sorted(np.flatnonzero(visual[row]), key=lambda at: -drift[row, at])[:count]
        assert set(np.flatnonzero(chosen[row] & visual[row])) == set(most)
        taken += count
    assert 0 < taken < visual.sum()  # else the choice would not have been put to the test


def test_text_alone_has_no_visual_traits_and_joins_images(params):
    samples = encoded(2)
    plain = np.where(samples.tokens == CONFIG.image_token, 1, samples.tokens)
    text = Encoded(plain[:, :12], np.minimum(samples.lengths, 12), samples.is_answer[:, :12], None, samples.kinds)
    alone = calibrate.statistics(CONFIG, params, text)[0]
    assert np.isnan(alone.traits.visual_spread)
    assert np.isnan(alone.traits.cross_spread)
    both = calibrate.statistics(CONFIG, params, [samples, text])[0]
    images = calibrate.statistics(CONFIG, params, samples)[0]
    counts = samples.lengths.sum(), text.lengths.sum()
    mean = (images["o"].x_sq * counts[0] + alone["o"].x_sq * counts[1]) / sum(counts)
    np.testing.assert_allclose(both["o"].x_sq, mean, rtol=1e-4)


@pytest.mark.parametrize("grams", [False, True])
def test_statistics_survive_being_taken_apart(params, grams):
    stats = calibrate.statistics(CONFIG, params, encoded(2), grams=grams)[1]
    again = from_arrays(to_arrays(stats))
    jax.tree.map(np.testing.assert_array_equal, stats, again)
    assert again["q"].x_sq is again["v"].x_sq
