"""The objective: one program for every candidate, and the numbers that the deployed model gives."""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import CONFIG, encoded

from lmmjax import calibrate, likelihood, llava
from lmmjax.cache import empty_cache
from lmmjax.plan import CacheFormat
from lmmjax.prune import transform
from lmmjax.prune.budget import WeightBudget
from search import objective
from search.cache_budget import CacheBudget
from search.objective import OBJECTIVES, Evaluator
from search.space import Space, dense

FORM = CacheFormat(group=8)
LAYERS = CONFIG.text.layers


@pytest.fixture(scope="module")
def params():
    return llava.init(CONFIG, jax.random.key(0))


@pytest.fixture(scope="module")
def ranks(params):
    return transform.rank_model(CONFIG, params, calibrate.statistics(CONFIG, params, encoded(8, seed=1)), "lognorm")


@pytest.fixture(scope="module")
def space():
    return Space(WeightBudget(CONFIG.text, 0.5), CacheBudget(CONFIG.text, 0.5, 64, FORM), "linear")


def candidates(space: Space, count: int):
    rng = np.random.default_rng(0)
    for _ in range(count):
        yield space.candidate({name: rng.uniform(d.low, d.high) for name, d in space.distributions.items()})


def test_five_plans_take_one_trace(params, ranks, space, monkeypatch):
    traces, log_probs = [], likelihood.log_probs
    monkeypatch.setattr(likelihood, "log_probs", lambda *args: traces.append(1) or log_probs(*args))
    evaluator = Evaluator(CONFIG, params, ranks, FORM, encoded(10), batch=3)  # a shape of this test's own
    pruners = objective.pruned._cache_size()
    results = [evaluator(candidate) for candidate in candidates(space, 5)]
    assert len(traces) == 1
    assert objective.pruned._cache_size() == pruners
    assert len({result.kl for result in results}) == 5


def test_predictions_are_compared_batch_by_batch(params, ranks, space, monkeypatch):
    evaluator = Evaluator(CONFIG, params, ranks, FORM, encoded(10), batch=4)
    predict, compare, order = objective._predict, objective._compare, []
    monkeypatch.setattr(objective, "_predict", lambda *args: order.append("predict") or predict(*args))
    monkeypatch.setattr(objective, "_compare", lambda *args: order.append("compare") or compare(*args))
    evaluator(dense(LAYERS))
    assert order == ["predict", "compare"] * 3


def test_perplexity_is_infinite_where_it_is_too_large_for_a_number():
    assert objective.perplexity(SimpleNamespace(nll=1000.0)) == math.inf  # pyright: ignore[reportArgumentType]
    assert objective.perplexity(SimpleNamespace(nll=math.nan)) == math.inf  # pyright: ignore[reportArgumentType]


def test_the_dense_model_does_not_stray_from_itself(params, ranks):
    result = Evaluator(CONFIG, params, ranks, FORM, encoded(6))(dense(LAYERS))
    assert result.kl == 0
    assert result.nll > 0


@pytest.mark.parametrize(
    "form",
    [
        FORM,
        # What is exact in 16 bits is turned before it is stored where bits are data, and not in a dense layer.
        CacheFormat(
            8, sinks=1, dtype="float32", metadata="float8", keys="before_rope", rotate_values="online", clip=True
        ),
        CacheFormat(8, value_group=4, dtype="float32", visual_values="tokens", rotate_keys=True),
    ],
)
def test_a_candidate_is_judged_as_its_checkpoint_behaves(params, ranks, space, form):
    """The same numbers from the pruned weights and the packed cache, without the search's parts."""
    data = encoded(6)
    candidate = next(candidates(space, 1))
    result = Evaluator(CONFIG, params, ranks, form, data, batch=4)(candidate)
    plan = candidate.plan(cache=form)
    reference = predictions(params, dense(LAYERS).plan(cache=form), data)
    predicted = predictions(transform.apply_plan(CONFIG, params, ranks, plan), plan, data)
    for row in range(6):
        at = np.flatnonzero(data.is_answer[row])
        targets = data.tokens[row, at]
        p, q = reference[row, at - 1], predicted[row, at - 1]
        assert result.sums.kl[row] == pytest.approx((np.exp(p) * (p - q)).sum(), abs=1e-4)
        assert result.sums.nll[row] == pytest.approx(-q[np.arange(len(at)), targets].sum(), abs=1e-4)
        assert result.sums.tokens[row] == len(at)
        assert bool(result.sums.correct[row]) == bool((q.argmax(-1) == targets).all())


def predictions(params, plan, data) -> np.ndarray:
    @jax.jit
    def run(params):
        x = llava.embed(CONFIG, params, data.tokens, llava.encode_images(CONFIG, params, data.pixels))
        # As much room again for a picture's tokens, whose parts are of their own.
        cache = empty_cache(CONFIG.text, plan, x.shape[0], 2 * x.shape[1], images=x.shape[1])
        visual = llava.image_tokens(CONFIG, jnp.asarray(data.tokens), jnp.asarray(data.lengths))
        states, _ = llava.extend(CONFIG, params, cache, x, jnp.asarray(data.lengths), visual=visual)
        return jax.nn.log_softmax(llava.logits(CONFIG, params, states), axis=-1)

    return np.asarray(run(params))


def test_other_ranks_prune_otherwise(params, ranks, space):
    evaluator = Evaluator(CONFIG, params, ranks, FORM, encoded(4))
    candidate = next(candidates(space, 1))
    reverse = jax.tree.map(lambda rank: rank.shape[0] - 1 - rank, ranks)
    assert evaluator(candidate, reverse).kl != evaluator(candidate).kl


def test_objectives_fall_as_the_model_gets_better(params, ranks, space):
    evaluator = Evaluator(CONFIG, params, ranks, FORM, encoded(6), tokens="text")
    good, bad = evaluator(dense(LAYERS)), evaluator(next(candidates(space, 1)))
    assert OBJECTIVES["kl"](good) < OBJECTIVES["kl"](bad)
    for name, of in OBJECTIVES.items():
        assert np.isfinite(of(bad)), name
