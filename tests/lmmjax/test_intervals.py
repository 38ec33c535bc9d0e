"""Intervals against their textbooks, and against the truth they should cover."""

import numpy as np
import pytest

from lmmjax.intervals import bootstrap, wilson


@pytest.mark.parametrize(
    ("successes", "n", "expected"),
    [(81, 263, (0.2553, 0.3662)), (0, 20, (0.0, 0.1611)), (20, 20, (0.8389, 1.0)), (1, 29, (0.0061, 0.1718))],
)
def test_wilson_gives_the_published_intervals(successes, n, expected):
    """Newcombe 1998, Statistics in Medicine 17, 857, table I (method 3)."""
    assert wilson(successes, n) == pytest.approx(expected, abs=1e-4)


def test_the_bootstrap_covers_a_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(100):
        low, high = bootstrap(rng.exponential(2.0, 80), seed=seed)
        covered += low <= 2.0 <= high
    assert 85 <= covered <= 100


def test_the_bootstrap_of_a_ratio_weighs_samples_by_their_denominator():
    tokens = np.array([1, 9] * 50)
    low, high = bootstrap(tokens * np.array([1.0, 3.0] * 50), tokens)
    assert low < 2.8 < high  # (1 * 1 + 9 * 3) / 10
    assert high < 3


def test_a_difference_of_nothing_has_no_width():
    assert bootstrap(np.zeros(10)) == (0, 0)
