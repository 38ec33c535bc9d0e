"""Draws follow temperature, top-k and top-p as NumPy derives them, and changing these compiles nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmmjax.sample import Sampling, sample

DRAWS = 4000
draw = jax.jit(sample)


def logits(rows: int = 1, size: int = 24) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(rows, size)).astype(np.float32) * 2


def allowed(row: np.ndarray, temperature: float, top_k: int, top_p: float) -> dict[int, float]:
    """Returns token -> probability, derived one step at a time."""
    order = np.argsort(-row)[: top_k or None]
    weights = np.exp((row[order] - row[order[0]]) / temperature)
    weights /= weights.sum()
    before = np.cumsum(weights) - weights
    order, weights = order[before < top_p], weights[before < top_p]
    return dict(zip(order.tolist(), (weights / weights.sum()).tolist(), strict=True))


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.5, 0, 1.0), (1.0, 5, 1.0), (1.5, 0, 0.6), (0.8, 6, 0.7)]
)
def test_frequencies_are_the_derived_probabilities(temperature: float, top_k: int, top_p: float):
    row = logits()[0]
    many = jnp.broadcast_to(row, (DRAWS, len(row)))
    drawn = draw(many, jax.random.split(jax.random.key(0), DRAWS), Sampling(temperature, top_k, top_p))
    expected = allowed(row, temperature, top_k, top_p)
    assert set(np.unique(drawn).tolist()) <= set(expected)
    counts = np.bincount(drawn, minlength=len(row)) / DRAWS
    for token, probability in expected.items():
        assert abs(counts[token] - probability) < 5 * np.sqrt(probability / DRAWS) + 1e-3


@settings(max_examples=30, deadline=None)
@given(st.floats(0.1, 3), st.integers(0, 30), st.floats(0.01, 1), st.integers(0, 2**31))
def test_no_draw_leaves_the_allowed_set(temperature: float, top_k: int, top_p: float, seed: int):
    rows = logits(16)
    # A hair to either side of p: a cumulative sum in float32 may fall on another side of it than in float64.
    drawn = draw(rows, jax.random.split(jax.random.key(seed), 16), Sampling(temperature, top_k, top_p))
    for row, token in zip(rows, drawn.tolist(), strict=True):
        assert token in allowed(row, temperature, top_k, min(top_p + 1e-4, 1.0))


def test_temperature_zero_is_greedy_whatever_the_filters():
    rows = logits(8)
    keys = jax.random.split(jax.random.key(3), 8)
    for sampling in (Sampling(), Sampling(0.0, 3, 0.5)):
        np.testing.assert_array_equal(draw(rows, keys, sampling), rows.argmax(-1))


def test_the_best_token_is_always_allowed():
    keys = jax.random.split(jax.random.key(3), 8)
    for sampling in (Sampling(1.0, 1, 1.0), Sampling(1.0, 0, 0.0)):
        np.testing.assert_array_equal(draw(logits(8), keys, sampling), logits(8).argmax(-1))


def test_a_row_draws_alone_what_it_draws_in_a_batch():
    rows, keys = logits(8), jax.random.split(jax.random.key(5), 8)
    together = draw(rows, keys, Sampling(1.0, 0, 0.9))
    alone = [int(draw(rows[i : i + 1], keys[i : i + 1], Sampling(1.0, 0, 0.9))[0]) for i in range(8)]
    assert together.tolist() == alone


def test_settings_are_data():
    traces = []

    @jax.jit
    def counted(logits, keys, sampling):
        traces.append(sampling)
        return sample(logits, keys, sampling)

    keys = jax.random.split(jax.random.key(0), 1)
    for sampling in (Sampling(), Sampling(0.7), Sampling(1.0, 40), Sampling(0.2, 3, 0.9)):
        counted(logits(), keys, sampling)
    assert len(traces) == 1
