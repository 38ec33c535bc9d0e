"""Points of the space, and the candidates that they stand for."""

import numpy as np
import pytest

from lmmjax.config import LINEARS, TextConfig
from lmmjax.errors import InputError
from lmmjax.plan import CacheFormat
from lmmjax.prune.budget import WeightBudget
from search.cache_budget import CacheBudget
from search.space import Space

TEXT = TextConfig(vocab=64, width=64, ffn=176, layers=5, heads=4, kv_heads=2, head_dim=16, context=512)


def space(blocks: str = "layer", keep: float = 0.5, kv: float = 0.5) -> Space:
    return Space(WeightBudget(TEXT, keep), CacheBudget(TEXT, kv, 512, CacheFormat()), blocks)


def random_point(space: Space, seed: int = 0) -> dict[str, float]:
    rng = np.random.default_rng(seed)
    return {name: rng.uniform(d.low, d.high) for name, d in space.distributions.items()}


@pytest.mark.parametrize(("blocks", "count"), [("1", 1), ("2", 2), ("5", 5), ("layer", 5), ("linear", 35)])
def test_there_is_one_sparsity_a_group_and_two_widths_a_layer(blocks, count):
    found = space(blocks)
    assert len(found.sparsity_names) == count
    assert len(found.distributions) == count + 2 * TEXT.layers
    assert set(found.groups.ravel()) == set(range(count))


def test_blocks_are_contiguous_and_as_even_as_possible():
    assert space("2").groups[:, 0].tolist() == [0, 0, 0, 1, 1]
    assert (space("2").groups == space("2").groups[:, :1]).all()


@pytest.mark.parametrize("blocks", ["1", "3", "layer", "linear"])
@pytest.mark.parametrize("seed", range(3))
def test_every_point_stands_for_a_candidate_on_both_budgets(blocks, seed):
    found = space(blocks, 0.6, 0.4)
    candidate = found.candidate(random_point(found, seed))
    assert abs(found.weights.kept(candidate.drops) - 0.6) < 1e-3
    assert found.cache.share(candidate.key_bits, candidate.value_bits) <= 0.4
    assert candidate.plan().check(TEXT).sparsity(TEXT) == pytest.approx(0.4, abs=1e-3)


@pytest.mark.parametrize("blocks", ["layer", "linear"])
def test_a_candidate_survives_encoding(blocks):
    found = space(blocks)
    candidate = found.candidate(random_point(found))
    again = found.candidate(found.encode(candidate))
    assert np.abs(candidate.drops - again.drops).max() <= 2
    np.testing.assert_array_equal(candidate.key_bits, again.key_bits)
    np.testing.assert_array_equal(candidate.value_bits, again.value_bits)


def test_encoded_points_lie_within_the_space():
    found = space("linear", 0.95)
    point = found.encode(found.candidate(random_point(found)))
    assert all(
        found.distributions[name].low <= value <= found.distributions[name].high for name, value in point.items()
    )


def test_uniform_starts_are_uniform_in_sparsity_and_on_the_budget():
    found = space()
    starts = found.uniform()
    assert len(starts) >= 2
    for start in starts:
        assert (start.drops == found.weights.uniform()).all()
        assert found.cache.share(start.key_bits, start.value_bits) <= 0.5


def test_a_budget_of_one_leaves_nothing_to_choose():
    assert space(kv=1).distributions.keys() == {f"sparsity.{i}" for i in range(5)}
    widths = space(keep=1)
    assert all("width" in name for name in widths.distributions)
    candidate = widths.candidate(random_point(widths))
    assert not candidate.drops.any()
    assert (space(kv=1).candidate(random_point(space(kv=1))).key_bits == 16).all()


def test_a_plan_carries_the_candidate_and_its_settings():
    found = space()
    candidate = found.candidate(random_point(found))
    plan = candidate.plan(score="wanda")
    assert plan.score == "wanda"
    assert [[layer.drop[name] for name in LINEARS] for layer in plan.layers] == candidate.drops.tolist()
    assert [layer.key_bits for layer in plan.layers] == candidate.key_bits.tolist()


@pytest.mark.parametrize("blocks", ["0", "6", "-1", "block", "2.5"])
def test_an_unknown_grouping_is_refused(blocks):
    with pytest.raises(InputError, match=r"--blocks: got .* from 1 to 5"):
        space(blocks)
