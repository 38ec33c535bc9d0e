"""Masks by rank, calibration's statistics, and the transform's promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from small import CONFIG, encoded

from lmmjax import calibrate, llava
from lmmjax.config import LINEARS
from lmmjax.errors import InputError
from lmmjax.plan import uniform
from lmmjax.prune import masks, transform
from lmmjax.prune.scores import SCORES


@pytest.fixture(scope="module")
def params():
    return llava.init(CONFIG, jax.random.key(0))


@given(score=hnp.arrays(np.float32, (12, 5), elements=st.sampled_from([0.0, 1.0, 2.0])), count=st.integers(0, 12))
@settings(deadline=None)
def test_ties_do_not_overshoot(score, count):
    keep = np.asarray(masks.drop_lowest(masks.rank(jnp.asarray(score)), count))
    np.testing.assert_array_equal((~keep).sum(0), count)
    for column in range(5):
        dropped, kept = score[~keep[:, column], column], score[keep[:, column], column]
        assert not dropped.size or not kept.size or dropped.max() <= kept.min()


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (3, 6), (12, 12)])
def test_n_of_m_keeps_the_highest_of_each_block(n, m):
    score = np.random.default_rng(2).standard_normal((24, 7)).astype(np.float32)
    keep = np.asarray(masks.keep_n_of_m(jnp.asarray(score), n, m)).reshape(24 // m, m, 7)
    np.testing.assert_array_equal(keep.sum(1), n)
    blocks = score.reshape(24 // m, m, 7)
    assert (np.where(keep, blocks, np.inf).min(1) >= np.where(keep, -np.inf, blocks).max(1)).all()


@pytest.mark.parametrize(("n", "m"), [(3, 2), (2, 5), (0, 4)])
def test_impossible_patterns_are_refused(n, m):
    with pytest.raises(InputError, match=f"got {n}:{m} for 12 inputs"):
        masks.keep_n_of_m(jnp.ones((12, 2)), n, m)


def test_statistics_equal_a_forward_pass_by_hand(params):
    """The first layer's q sees the normed embeddings, so its mean squares can be derived without the tap."""
    samples = encoded(5)
    for choice in ("all", "text"):
        images = llava.encode_images(CONFIG, params, jnp.asarray(samples.pixels))
        x = np.float64(llava.embed(CONFIG, params, jnp.asarray(samples.tokens), images))
        normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + CONFIG.text.eps)
        valid = np.arange(samples.tokens.shape[1]) < samples.lengths[:, None]
        chosen = valid if choice == "all" else valid & (samples.tokens != CONFIG.image_token)
        stats = calibrate.statistics(CONFIG, params, samples, choice)
        assert [set(layer.linears) for layer in stats] == [set(LINEARS)] * CONFIG.text.layers
        np.testing.assert_allclose(stats[0]["q"].x_sq, (normed[chosen] ** 2).mean(0), rtol=1e-4)
        assert stats[0]["q"].x_sq is stats[0]["v"].x_sq


def test_batching_does_not_change_statistics(params, monkeypatch):
    whole = calibrate.statistics(CONFIG, params, encoded(5))
    monkeypatch.setattr(calibrate.walk, "TOKENS", 32)
    parts = calibrate.statistics(CONFIG, params, encoded(5))
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4)


def test_an_unknown_token_choice_is_refused(params):
    with pytest.raises(InputError, match="got 'visual', expected all, text or drift"):
        calibrate.statistics(CONFIG, params, encoded(2), "visual")


def half(index, name, score):
    return masks.drop_lowest(masks.rank(score), score.shape[0] // 2)


def test_pruning_is_exact_and_touches_nothing_else(params):
    def only_first_q(index, name, score):
        return half(index, name, score) if (index, name) == (0, "q") else None

    pruned = transform.prune(CONFIG, params, encoded(4), "wanda", only_first_q)
    before, after = dict(jax.tree.leaves_with_path(params)), dict(jax.tree.leaves_with_path(pruned))
    changed = [jax.tree_util.keystr(path) for path in before if before[path] is not after[path]]
    assert changed == ["['text']['layers_0']['attn']['q']['kernel']"]
    kernel = np.asarray(pruned["text"]["layers_0"]["attn"]["q"]["kernel"])
    np.testing.assert_array_equal((kernel == 0).sum(0), kernel.shape[0] // 2)
    kept = kernel != 0
    np.testing.assert_array_equal(kernel[kept], np.asarray(params["text"]["layers_0"]["attn"]["q"]["kernel"])[kept])


def test_sequential_statistics_see_the_pruned_prefix(params):
    """One-shot and sequential agree on the first layer's attention and part ways behind the first mask."""
    samples = encoded(6)
    one_shot = transform.prune(CONFIG, params, samples, "wanda", half, sequential=False)
    sequential = transform.prune(CONFIG, params, samples, "wanda", half)
    first, last = (f"layers_{i}" for i in (0, CONFIG.text.layers - 1))

    def same(layer):
        pairs = zip(jax.tree.leaves(one_shot["text"][layer]), jax.tree.leaves(sequential["text"][layer]), strict=True)
        return all(bool((a == b).all()) for a, b in pairs)

    assert same(first)
    assert not same(last)
    prefix = params | {"text": sequential["text"] | {last: params["text"][last]}}
    stats = calibrate.statistics(CONFIG, prefix, samples)[-1]
    score = SCORES["wanda"].rule(params["text"][last]["mlp"]["down"]["kernel"], stats["down"])
    expected = np.where(half(0, "down", score), params["text"][last]["mlp"]["down"]["kernel"], 0)
    np.testing.assert_array_equal(sequential["text"][last]["mlp"]["down"]["kernel"], expected)


def test_a_plan_and_its_traced_form_prune_alike(params):
    ranks = transform.rank_model(CONFIG, params, calibrate.statistics(CONFIG, params, encoded(4)), "lognorm")
    drop = {name: int(CONFIG.text.linear_shape(name)[0] * 0.3) for name in LINEARS} | {"gate": 0}
    plan = uniform(CONFIG.text, drop=drop)
    applied = transform.apply_plan(CONFIG, params, ranks, plan)
    drops = jnp.asarray([[layer.drop[name] for name in LINEARS] for layer in plan.layers])
    traced = jax.jit(transform.masked)(params, ranks, drops)
    jax.tree.map(np.testing.assert_array_equal, applied, traced)
    assert applied["text"]["layers_1"]["mlp"]["gate"]["kernel"] is params["text"]["layers_1"]["mlp"]["gate"]["kernel"]
    kernel = applied["text"]["layers_0"]["mlp"]["down"]["kernel"]
    assert int((kernel == 0).sum()) == int(kernel.shape[0] * 0.3) * kernel.shape[1]
