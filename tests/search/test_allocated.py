"""Starts from allocations: on the budget and within the box, one a name; unknown names are refused."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from small import CONFIG, encoded

from lmmjax import calibrate, llava
from lmmjax.errors import InputError
from lmmjax.plan import CacheFormat
from lmmjax.prune.allocations import ALLOCATIONS as TABLE
from lmmjax.prune.budget import WeightBudget
from search import allocated
from search.cache_budget import CacheBudget
from search.settings import ALLOCATIONS
from search.space import Space


@pytest.fixture(scope="module")
def problem():
    params = llava.init(CONFIG, jax.random.key(0))
    weights = WeightBudget(CONFIG.text, 0.5, box=0.1)
    space = Space(weights, CacheBudget(CONFIG.text, 0.6, 64, CacheFormat(group=8), images=4), "layer")
    statistics = calibrate.statistics(CONFIG, params, encoded(8))
    return SimpleNamespace(checkpoint=SimpleNamespace(config=CONFIG, params=params), space=space, statistics=statistics)


def test_starts_lie_on_the_budget_and_differ_from_uniform(problem):
    found = allocated.starts(problem, ALLOCATIONS)
    weights, uniform = problem.space.weights, problem.space.uniform()[0]
    assert len(found) == len(ALLOCATIONS)
    for start in found:
        assert weights.kept(start.drops) == pytest.approx(0.5, abs=2e-3)
        assert (abs(start.drops / weights.inputs - 0.5) < 0.1 + 2 / 32).all()  # the box, and rounding to whole inputs
        np.testing.assert_array_equal(start.key_bits, uniform.key_bits)
    assert any((start.drops != uniform.drops).any() for start in found)
    assert allocated.starts(problem, ()) == []


def test_names_are_those_that_need_no_loss():
    assert set(ALLOCATIONS) == {name for name, one in TABLE.items() if not one.needs_loss} - {"uniform"}
    assert allocated.read("owl,mgaa") == ("owl", "mgaa")
    assert allocated.read(None) == ()
    with pytest.raises(InputError, match="--allocations: got 'ecoflap', expected some of owl,"):
        allocated.read("owl,ecoflap")
