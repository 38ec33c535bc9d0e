"""Every allocation lands on the exact budget, treats like layers alike, and says what it lacks."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from lmmjax.calibrate.statistics import LayerStatistics, LinearStatistics, Traits
from lmmjax.config import LINEARS, TextConfig
from lmmjax.errors import InputError
from lmmjax.prune.allocations import ALLOCATIONS, Evidence, allocate, wish
from lmmjax.prune.budget import WeightBudget

TEXT = TextConfig(vocab=64, width=64, ffn=176, layers=4, heads=4, kv_heads=2, head_dim=16, context=512)
ATTENTION = LINEARS[:4]


def layer(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    made = {"attn": {}, "mlp": {}}
    for name in LINEARS:
        kernel = rng.standard_normal(TEXT.linear_shape(name)) * rng.gamma(0.5, size=(1, TEXT.linear_shape(name)[1]))
        made["attn" if name in ATTENTION else "mlp"][name] = {"kernel": jnp.asarray(kernel, jnp.float32)}
    return made


def statistics(seed: int, visual: bool = True) -> LayerStatistics:
    rng = np.random.default_rng(seed)
    traits = Traits(*rng.uniform(0.1, 0.9, 5))
    traits = traits if visual else traits._replace(visual_spread=np.nan, cross_spread=np.nan)
    inputs = {name: rng.gamma(0.2, size=TEXT.linear_shape(name)[0]) for name in LINEARS}
    return LayerStatistics({name: LinearStatistics(jnp.asarray(x, jnp.float32)) for name, x in inputs.items()}, traits)


def loss(index: int, params: dict) -> float:
    """Linear in the weights, and unlike from layer to layer."""
    return (index + 1) * float(params["attn"]["q"]["kernel"].sum() - params["mlp"]["down"]["kernel"].sum())


def evidence(sparsity: float = 0.5, layers: int = 4, alike: bool = False, visual: bool = True) -> Evidence:
    seeds = [0] * layers if alike else range(layers)
    return Evidence(
        text=dataclasses.replace(TEXT, layers=layers),
        sparsity=sparsity,
        layer=lambda index: layer(seeds[index]),
        statistics=[statistics(seed, visual) for seed in seeds],
        loss=(lambda index, params: loss(0, params) if alike else loss(index, params)),
    )


@pytest.mark.parametrize("sparsity", [0.4, 0.5, 0.6, 0.7])
@pytest.mark.parametrize("name", ALLOCATIONS)
def test_the_budget_is_exact_and_the_wish_was_near_it(name, sparsity):
    given = evidence(sparsity)
    budget = WeightBudget(TEXT, 1 - sparsity)
    drops = allocate(name, given)
    assert drops.shape == (4, 7)
    assert ((drops >= 0) & (drops <= budget.inputs)).all()
    assert abs(budget.kept(drops) - (1 - sparsity)) <= 1e-4
    # Nothing was cut off here, so rules that promise the mean had it already, and projecting hardly moves them.
    wished = wish(name, given)
    assert ((wished > 0) & (wished < 1)).all()
    assert np.abs(wished - drops / budget.inputs).max() < 1.5 * TEXT.ffn / 32 / TEXT.width


def test_a_wish_for_more_than_all_is_cut_and_the_budget_stays_exact():
    given = evidence(0.9)
    assert wish("alphapruning", given).max() == 1
    drops = allocate("alphapruning", given)
    assert (drops == WeightBudget(TEXT, 0.1).inputs).all(axis=1).any()
    assert abs(WeightBudget(TEXT, 0.1).kept(drops) - 0.1) <= 1e-4


@pytest.mark.parametrize("name", sorted(set(ALLOCATIONS) - {"uniform"}))
def test_unlike_layers_are_pruned_unlike(name):
    assert np.ptp(wish(name, evidence())[:, 0]) > 0.01


@pytest.mark.parametrize("name", sorted(set(ALLOCATIONS) - {"mgaa", "ecoflap"}))
def test_like_layers_are_pruned_alike(name):
    assert wish(name, evidence(0.6, alike=True)) == pytest.approx(np.full((4, 7), 0.6))


@pytest.mark.parametrize("name", sorted(set(ALLOCATIONS) - {"mgaa"}))
def test_a_single_layer_gets_the_target(name):
    assert wish(name, evidence(0.6, layers=1)) == pytest.approx(np.full((1, 7), 0.6))


@pytest.mark.parametrize(("name", "visual"), [("das", True), ("das", False), ("mgaa", True)])
def test_more_spread_or_drift_keeps_more(name, visual):
    given = evidence(0.6, visual=visual)
    traits = [stats.traits for stats in given.statistics]
    judged = {
        ("das", True): [(t.visual_spread + t.text_spread + t.cross_spread) / 3 for t in traits],
        ("das", False): [t.text_spread for t in traits],
        ("mgaa", True): [t.attn_drift for t in traits],
    }[name, visual]
    sparsities = wish(name, given)[:, 0]
    assert np.argsort(sparsities).tolist() == np.argsort(judged)[::-1].tolist()


@pytest.mark.parametrize("name", ALLOCATIONS)
def test_each_layer_is_asked_for_once_and_only_where_the_table_says_so(name):
    asked = []
    given = dataclasses.replace(evidence(), layer=lambda index: asked.append(index) or layer(index))
    wish(name, given)
    assert asked == (list(range(4)) if ALLOCATIONS[name].needs_layers else [])


@pytest.mark.parametrize("name", ALLOCATIONS)
def test_an_allocation_reads_nothing_that_the_table_does_not_name(name):
    kind, given = ALLOCATIONS[name], evidence()
    least = Evidence(
        TEXT,
        0.5,
        layer=given.layer if kind.needs_layers else lambda index: pytest.fail("asked for a layer"),
        statistics=given.statistics if kind.needs_statistics else (),
        loss=given.loss if kind.needs_loss else None,
    )
    assert wish(name, least).tolist() == wish(name, given).tolist()


@pytest.mark.parametrize("name", [name for name, kind in ALLOCATIONS.items() if kind.needs_statistics])
def test_statistics_of_other_layers_are_refused(name):
    with pytest.raises(InputError, match=rf"allocation {name}: got statistics of 1 layers, expected 4"):
        wish(name, dataclasses.replace(evidence(), statistics=evidence().statistics[:1]))


def test_a_missing_loss_is_refused():
    with pytest.raises(InputError, match="allocation ecoflap: got no loss"):
        wish("ecoflap", dataclasses.replace(evidence(), loss=None))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_loss_that_is_no_number_is_refused(value):
    losses = [0.0] * 4 + [value, 0.0] + [0.0] * 2
    given = dataclasses.replace(evidence(), loss=lambda index, params: losses.pop(0))
    with pytest.raises(InputError, match="allocation ecoflap: got no loss of layers 2, expected a finite number"):
        wish("ecoflap", given)


@pytest.mark.parametrize(
    ("name", "lacking", "message"),
    [
        ("das", dict.fromkeys(["visual_spread", "text_spread", "cross_spread"], np.nan), "spread of tokens"),
        ("mgaa", {"mlp_drift": np.nan}, "drift"),
    ],
)
def test_a_layer_without_traits_is_refused(name, lacking, message):
    stats = list(evidence().statistics)
    stats[1] = stats[1].replace(traits=stats[1].traits._replace(**lacking))
    with pytest.raises(InputError, match=f"allocation {name}: got no {message} of layers 1, expected"):
        wish(name, dataclasses.replace(evidence(), statistics=stats))


@pytest.mark.parametrize("kernel", [np.eye(64), np.zeros((64, 64)), np.ones((64, 64))])
def test_a_spectrum_without_a_tail_is_refused(kernel):
    def with_kernel(index: int) -> dict:
        return layer(index) | ({"attn": layer(index)["attn"] | {"o": {"kernel": jnp.asarray(kernel)}}} if index else {})

    with pytest.raises(InputError, match=r"alphapruning: got no tail of eigenvalues in layer 1's o, expected"):
        wish("alphapruning", dataclasses.replace(evidence(), layer=with_kernel))


def test_a_box_around_the_target_holds_for_allocations_too():
    narrow = WeightBudget(TEXT, 0.5, box=0.02)
    drops = allocate("owl", evidence(), narrow)
    assert np.ptp(wish("owl", evidence())) > 0.1
    assert abs(narrow.kept(drops) - 0.5) <= 1e-4
    assert np.abs(drops / narrow.inputs - 0.5).max() < 0.02 + 1.5 * TEXT.ffn / 32 / TEXT.width


@pytest.mark.parametrize(
    "budget", [WeightBudget(TEXT, 0.4), WeightBudget(dataclasses.replace(TEXT, layers=3), 0.5, box=1.0)]
)
def test_a_budget_of_something_else_is_refused(budget):
    with pytest.raises(InputError, match="budget: got one that keeps"):
        allocate("uniform", evidence(0.5), budget)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0])
def test_a_target_outside_its_range_is_refused(sparsity):
    with pytest.raises(InputError, match="sparsity: got"):
        evidence(sparsity)


def test_an_unknown_name_is_refused_with_those_there_are():
    with pytest.raises(InputError, match="got 'owls', expected one of uniform, owl, alphapruning, ecoflap, das, mgaa"):
        wish("owls", evidence())
