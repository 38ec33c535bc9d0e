"""Every projection lands on the budget, whatever is wished for."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmmjax.cache import cache_bytes
from lmmjax.config import TextConfig
from lmmjax.errors import InputError
from lmmjax.plan import BITS, CacheFormat, LayerPlan, Plan
from lmmjax.prune.budget import WeightBudget, round_counts
from search.cache_budget import CacheBudget

TEXT = TextConfig(vocab=64, width=64, ffn=176, layers=4, heads=4, kv_heads=2, head_dim=16, context=512)


@st.composite
def text_configs(draw) -> TextConfig:
    """A decoder of any shape, GQA or not."""
    kv_heads, ratio = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    return TextConfig(
        vocab=32,
        width=draw(st.integers(3, 300)),
        ffn=draw(st.integers(3, 700)),
        layers=draw(st.integers(1, 9)),
        heads=kv_heads * ratio,
        kv_heads=kv_heads,
        head_dim=4 * draw(st.integers(1, 8)),
        context=512,
    )


def wishes(seed: int, shape: tuple[int, ...], low: float = -1, high: float = 4) -> np.ndarray:
    return np.random.default_rng(seed).uniform(low, high, shape)


@given(text_configs(), st.floats(0.02, 1), st.floats(0, 1), st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_the_kept_share_is_the_budget_as_nearly_as_whole_inputs_allow(text, keep, box, seed):
    budget = WeightBudget(text, keep, box)
    drops = budget.project(wishes(seed, budget.inputs.shape, 0, 1))
    assert (drops >= 0).all()
    assert (drops <= budget.inputs).all()
    smallest = budget.outputs == budget.outputs.min()
    rows = budget.outputs.min() if (drops < budget.inputs)[smallest].any() else budget.outputs.max()
    error = abs(budget.kept(drops) - keep) * (budget.inputs * budget.outputs).sum()
    assert error <= rows / 2 + 1e-3


@given(st.floats(0.05, 1), st.floats(0, 0.5), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_the_kept_share_of_a_real_decoder_is_the_budget_to_four_decimals(keep, box, seed):
    seven_b = TextConfig(32064, 4096, 11008, 32, 32, 32, 128, 4096)
    budget = WeightBudget(seven_b, keep, box)
    assert abs(budget.kept(budget.project(wishes(seed, (32, 7), 0, 1))) - keep) <= 3.2e-7


@given(st.integers(1, 9), st.floats(0.1, 0.9), st.floats(0, 0.3), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_counts_stay_in_the_box_and_keep_the_order_of_the_wishes(layers, keep, box, seed):
    budget = WeightBudget(dataclasses.replace(TEXT, layers=layers), keep, box)
    wish = wishes(seed, budget.inputs.shape, 0, 1)
    drops = budget.project(wish)
    assert (drops >= np.floor(budget.low * budget.inputs)).all()
    # What is left for no larger linear goes to the smallest, input by input.
    most = budget.outputs.max() / budget.outputs.min()
    assert (drops <= budget.high * budget.inputs + 1 + most).all()
    name = 6  # `down`: alike in all layers, so a larger wish may not drop less by more than the rounding
    order = np.argsort(wish[:, name])
    assert (np.diff(drops[order, name]) >= -2).all()


def test_a_uniform_wish_gives_the_same_count_everywhere_when_it_is_whole():
    drops = WeightBudget(TEXT, 0.5).uniform()
    assert (drops * 2 == WeightBudget(TEXT, 0.5).inputs).all()


def test_a_wish_that_is_on_the_budget_is_its_own_projection():
    budget = WeightBudget(TEXT, 0.6)
    drops = budget.project(wishes(0, (4, 7), 0.25, 0.55))
    assert np.abs(budget.project(drops / budget.inputs) - drops).max() <= 1


def test_the_last_step_gives_to_those_that_lost_most_and_then_to_what_fits():
    costs, limits = np.array([10, 10, 4]), np.array([9, 9, 9])
    assert round_counts(np.array([1.6, 2.9, 0.5]), costs, limits, 47.0).tolist() == [1, 3, 2]
    assert round_counts(np.array([0.0, 0.0, 0.75]), costs, limits, 3.0).tolist() == [0, 0, 1]


@pytest.mark.parametrize("keep", [0.0, -0.1, 1.01])
def test_a_weight_budget_outside_its_range_is_refused(keep):
    with pytest.raises(InputError, match=r"--budget: got .*0 < share <= 1"):
        WeightBudget(TEXT, keep)


forms = st.builds(
    lambda group, windows: CacheFormat(group=group, window=group * windows), st.sampled_from([8, 32]), st.integers(0, 2)
)


def lowest_share(text: TextConfig, context: int, form: CacheFormat) -> float:
    """The smallest cache of all widths, a layer's sides being independent, by trying them all."""
    one = dataclasses.replace(text, layers=1)
    sizes = [cache_bytes(one, Plan((LayerPlan(k, v),), cache=form), 1, context) for k in BITS for v in BITS]
    return min(sizes) / cache_bytes(one, Plan((LayerPlan(),), cache=form), 1, context)


@given(text_configs(), st.floats(0.05, 1), st.integers(1, 700), forms, st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_the_cache_fits_its_budget_and_no_side_could_be_wider(text, keep, context, form, seed):
    lowest = lowest_share(text, context, form)
    if keep < lowest:
        with pytest.raises(InputError, match="the cache can take"):
            CacheBudget(text, keep, context, form)
        return
    budget = CacheBudget(text, keep, context, form)
    bits = budget.project(*wishes(seed, (2, text.layers)))
    assert budget.share(*bits) <= keep + 1e-9
    for side, name in enumerate(("keys", "values")):
        for layer in range(text.layers):
            wider = [width for width in budget.widths[name] if width > bits[side][layer]]
            if wider:
                more = [array.copy() for array in bits]
                more[side][layer] = wider[0]
                assert budget.share(*more) > keep


@given(
    st.floats(0.4, 1),
    st.integers(0, 99),
    st.sampled_from(
        [
            CacheFormat(),
            CacheFormat(metadata="float8", sinks=4),
            CacheFormat(8, 16, key_axis="channels", sinks=1, window=8),
            CacheFormat(visual_values="tokens", value_group=8),
        ]
    ),
)
@settings(max_examples=20, deadline=None)
def test_the_predicted_share_is_that_of_the_real_cache(keep, seed, form):
    budget = CacheBudget(TEXT, keep, 512, form, images=100)
    keys, values = budget.project(*wishes(seed, (2, 4)))
    plan = Plan(tuple(LayerPlan(int(k), int(v)) for k, v in zip(keys, values, strict=True)), cache=form)
    dense = cache_bytes(TEXT, Plan((LayerPlan(),) * 4, cache=form), 1, 512)
    assert budget.dense_bytes == dense
    assert budget.nbytes(keys, values) == cache_bytes(TEXT, plan, 1, 512, images=100) <= keep * dense + 1e-6


def test_a_cache_that_fits_is_kept_when_it_is_wished_for():
    budget = CacheBudget(TEXT, 0.6, 512, CacheFormat())
    keys, values = budget.project(np.array([3.0, 0, 2, 1]), np.array([0.0, 3, 0, 2]))
    again = budget.project(budget.encode("keys", keys), budget.encode("values", values))
    assert [array.tolist() for array in again] == [keys.tolist(), values.tolist()]


def test_ties_go_to_keys_and_then_to_the_first_layers():
    budget = CacheBudget(TEXT, 0.45, 512, CacheFormat())
    keys, values = budget.project(np.zeros(4), np.zeros(4))
    assert (np.diff(keys) <= 0).all()
    assert (np.diff(values) <= 0).all()
    assert (keys >= values).all()
    assert keys.max() > values.min()


def test_widths_that_save_nothing_are_not_offered():
    budget = CacheBudget(dataclasses.replace(TEXT, layers=1), 1.0, 32, CacheFormat(window=32))
    assert budget.widths == {"keys": (16,), "values": (16,)}
    with pytest.raises(InputError, match=r"the cache can take 1\.0000 to 1"):
        CacheBudget(TEXT, 0.5, 32, CacheFormat(window=32))


def test_uniform_widths_fit_largest_first_with_the_keys_wider():
    budget = CacheBudget(TEXT, 0.5, 2048, CacheFormat())
    pairs = budget.uniform()
    assert pairs[0] == (8, 4)
    assert set(pairs) == {(8, 4), (6, 6), (4, 8)}
    assert all(budget.share(np.full(4, k), np.full(4, v)) <= 0.5 for k, v in pairs)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 0.1}, r"--kv-budget: got 0\.1 .* can take 0\.\d+ to 1"),
        ({"keep": 1.5}, "--kv-budget: got 1.5"),
        ({"context": 0}, "--context: got 0"),
    ],
)
def test_a_cache_budget_that_cannot_be_met_is_refused(settings, message):
    with pytest.raises(InputError, match=message):
        CacheBudget(**{"text": TEXT, "keep": 0.5, "context": 512, "form": CacheFormat(), **settings})
