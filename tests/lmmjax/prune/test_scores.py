"""Scores against their NumPy derivations, and Wanda's two published procedures against ours by rank."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lmmjax.calibrate.statistics import LinearStatistics
from lmmjax.errors import InputError
from lmmjax.prune.masks import drop_lowest, rank
from lmmjax.prune.scores import SCORES


def scored(name, w, x_sq, g=None):
    """Our score of W as (out, in), turned back to (out, in)."""
    gradient = None if g is None or not SCORES[name].gradients else jnp.float32(g.T)
    return np.asarray(SCORES[name].rule(jnp.float32(w.T), LinearStatistics(jnp.float32(x_sq), gradient=gradient))).T


def wanda(w, x_sq):
    return np.abs(w) * np.sqrt(x_sq)


def cumulative(w, x_sq):
    """What the row's scores sum up to, from its lowest to this one, over the row's sum; scores all differ."""
    s = wanda(w, x_sq)
    return np.array([[row[row <= value].sum() / row.sum() for value in row] for row in s])


def ria(w, x_sq):
    column, row = np.abs(w).sum(0, keepdims=True), np.abs(w).sum(1, keepdims=True)
    return (np.abs(w) / column + np.abs(w) / row) * np.sqrt(x_sq) ** 0.5


def lognorm(w, x_sq):
    row, column = np.linalg.norm(w, axis=1, keepdims=True), np.linalg.norm(w, axis=0, keepdims=True)
    return np.log1p(np.abs(w) / row + np.abs(w) / column) * x_sq**0.25


FORMULAS = {
    "magnitude": lambda w, x_sq, g: np.abs(w),
    "wanda": lambda w, x_sq, g: wanda(w, x_sq),
    "wanda-cumulative": lambda w, x_sq, g: cumulative(w, x_sq),
    "ria": lambda w, x_sq, g: ria(w, x_sq),
    "lognorm": lambda w, x_sq, g: lognorm(w, x_sq),
    "pruner-zero": lambda w, x_sq, g: np.abs(w * w) * (g - g.min()) / (g.max() - g.min()),
}
"""The published formulas with W as (out, in), X's mean squares, G and the papers' letters, in float64."""


@pytest.mark.parametrize("name", SCORES)
def test_scores_equal_their_formulas(name):
    rng = np.random.default_rng(0)
    w, x_sq, g = rng.standard_normal((6, 9)), rng.uniform(0.1, 4, 9), np.abs(rng.standard_normal((6, 9)))
    np.testing.assert_allclose(scored(name, w, x_sq, g), FORMULAS[name](w, x_sq, g), rtol=1e-5)


def test_scores_of_half_precision_weights_are_float32():
    w, stats = jnp.full((4, 3), 1e-3, jnp.bfloat16), LinearStatistics(jnp.ones(4), gradient=jnp.ones((4, 3)))
    types = {name: jax.eval_shape(score.rule, w, stats).dtype for name, score in SCORES.items()}
    assert types == dict.fromkeys(SCORES, jnp.float32)


@pytest.mark.parametrize("name", ["wanda-cumulative", "ria", "lognorm"])
def test_scores_of_empty_rows_and_columns_are_numbers(name):
    w = np.ones((3, 4))
    w[:, 1], w[2] = 0, 0
    score = scored(name, w, np.ones(4))
    assert np.isfinite(score).all()
    assert not score[2].any()
    assert not score[:, 1].any()


def random_layer(seed, out=16, inputs=40):
    """Weights and inputs whose rows and columns differ in scale, as those of models do."""
    rng = np.random.default_rng(seed)
    w = rng.standard_t(3, (out, inputs)) * rng.lognormal(size=(out, 1))
    return w.astype(np.float32), (rng.standard_normal((50, inputs)) ** 2).mean(0) * rng.lognormal(size=inputs)


def test_wanda_mask_is_the_published_procedure():
    """Per output row: sort the scores, and the first int(columns * ratio) of the sorted indices go."""
    w, x_sq = random_layer(1)
    expected = np.ones_like(w, bool)
    order = np.argsort(wanda(w, x_sq), axis=1, kind="stable")
    np.put_along_axis(expected, order[:, : int(40 * 0.5)], False, axis=1)
    np.testing.assert_array_equal(drop_lowest(rank(jnp.asarray(scored("wanda", w, x_sq).T)), 20).T, expected)


def published_variant(metric, ratio, tolerance):
    """Which weights go: bisects the share alpha of a row's sum that its lowest may have, until the sparsity is near."""
    lowest_first = np.sort(metric, axis=1)
    sums, low, high = np.cumsum(lowest_first, axis=1), 0.0, 0.8
    for _ in range(60):
        alpha = (low + high) / 2
        counts = (sums <= alpha * metric.sum(1, keepdims=True)).sum(1, keepdims=True)
        gone = (metric <= np.take_along_axis(lowest_first, counts - 1, axis=1)) & (counts > 0)
        if abs(gone.mean() - ratio) <= tolerance:
            return gone
        low, high = (low, alpha) if gone.mean() > ratio else (alpha, high)
    raise AssertionError("alpha not found")


@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.7])
def test_cumulative_mask_is_the_published_variant_on_target(ratio):
    w, x_sq = random_layer(2)
    expected = published_variant(wanda(w, x_sq), ratio, tolerance=0)
    assert expected.sum() == w.size * ratio
    assert len(set(expected.sum(1))) > 3, "rows should differ, or this proves nothing"
    ranks = rank(jnp.asarray(scored("wanda-cumulative", w, x_sq).T), SCORES["wanda-cumulative"].over)
    np.testing.assert_array_equal(drop_lowest(ranks, round(40 * ratio)).T, ~expected)


def test_cumulative_order_is_the_published_variant_off_target():
    """Where bisection stops a few weights off, as many of our lowest are the very same ones."""
    w, x_sq = random_layer(3)
    expected = published_variant(wanda(w, x_sq), 0.5, tolerance=0.02)
    assert expected.sum() != w.size // 2
    order = np.argsort(scored("wanda-cumulative", w, x_sq), axis=None)
    assert set(order[: expected.sum()]) == set(np.flatnonzero(expected))


@given(w=hnp.arrays(np.float32, (5, 12), elements=st.sampled_from([0.0, 1.0, -1.0, 2.0])), count=st.integers(0, 12))
@settings(deadline=None)
def test_cumulative_counts_are_exact_and_equal_scores_go_in_order(w, count):
    score = scored("wanda-cumulative", w, np.ones(12))
    assert np.isfinite(score).all()
    keep = np.asarray(drop_lowest(rank(jnp.asarray(score.T), "matrix"), count)).T
    assert (~keep).sum() == 5 * count
    for row, kept in zip(np.abs(w), keep, strict=True):
        order = np.argsort(row, kind="stable")
        assert (np.diff(kept[order].astype(int)) >= 0).all(), "a row loses its lowest, equal ones in order"


def test_ria_drops_the_lowest_of_the_matrix_by_the_norm_of_the_tokens():
    """The paper has the tokens' norm where we have their mean square: one factor for all weights, so equal ranks."""
    rng = np.random.default_rng(4)
    w, x = rng.standard_normal((7, 20)), rng.standard_normal((50, 20)) * rng.lognormal(size=20)
    metric = ria(w, (x**2).sum(0))
    ranks = rank(jnp.asarray(scored("ria", w, (x**2).mean(0)).T), SCORES["ria"].over)
    np.testing.assert_array_equal(drop_lowest(ranks, 10).T, metric > np.sort(metric, axis=None)[7 * 10 - 1])


def test_pruner_zero_without_a_gradient_says_what_is_missing():
    with pytest.raises(InputError, match=r"gradient: got None, expected .*; calibrate with gradients"):
        SCORES["pruner-zero"].rule(jnp.ones((2, 2)), LinearStatistics(jnp.ones(2)))


def test_pruner_zero_with_one_gradient_everywhere_is_the_square():
    w = np.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(scored("pruner-zero", w, np.ones(3), np.full((2, 3), 0.25)), w**2)
