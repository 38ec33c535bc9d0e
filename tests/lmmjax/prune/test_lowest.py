"""The lowest without sorting are the first of a stable sort, ties, infinities and numbers below normal included."""

import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lmmjax.prune import lowest as module

SCORES = hnp.arrays(np.float32, (5, 4), elements=st.sampled_from([0.0, 1e-40, 0.5, 1.0, 3e38, np.inf]))
lowest = jax.jit(module.lowest, static_argnames="over")


@given(score=SCORES, count=st.integers(0, 20))
@settings(deadline=None)
def test_the_lowest_are_the_first_of_a_stable_sort(score, count):
    expected = np.zeros(20, bool)
    expected[np.argsort(score.ravel(), kind="stable")[:count]] = True
    np.testing.assert_array_equal(lowest(score, count).ravel(), expected)


@given(score=SCORES, count=st.integers(0, 5))
@settings(deadline=None)
def test_the_lowest_of_every_output_are_the_first_of_its_own_sort(score, count):
    expected = np.zeros(score.shape, bool)
    np.put_along_axis(expected, np.argsort(score, axis=0, kind="stable")[:count], True, axis=0)
    np.testing.assert_array_equal(lowest(score, count, over="output"), expected)
