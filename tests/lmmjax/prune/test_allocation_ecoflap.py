"""ECoFLaP equals its formula, derived again in float64, and so do the shares that it deals out."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmmjax.config import LINEARS, TextConfig
from lmmjax.prune.allocations import Evidence
from lmmjax.prune.allocations.ecoflap import ecoflap, perturbed, sensitivity
from lmmjax.prune.allocations.shares import proportional, unit_range

TEXT = TextConfig(vocab=8, width=24, ffn=40, layers=3, heads=4, kv_heads=2, head_dim=6, context=16)
PARTS = {name: "attn" if name in ("q", "k", "v", "o") else "mlp" for name in LINEARS}


def weights(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(TEXT.linear_shape(name)).astype(np.float32) for name in LINEARS}


def params(kernels: dict[str, np.ndarray], dtype=jnp.float32) -> dict:
    layer = {"attn": {}, "mlp": {}, "norm": {"scale": jnp.ones(3)}}
    for name, kernel in kernels.items():
        layer[PARTS[name]][name] = {"kernel": jnp.asarray(kernel, dtype)}
    return layer


def shares_by_hand(importance: np.ndarray, mean: float, floor: float) -> np.ndarray:
    """min(1, floor + t * importance) with the t that gives the mean, by bisection."""
    low, high = 0.0, 1 / importance.min()
    for _ in range(200):
        t = (low + high) / 2
        low, high = (t, high) if np.minimum(1, floor + t * importance).mean() < mean else (low, t)
    return np.minimum(1, floor + t * importance)


@given(st.lists(st.floats(1e-3, 10), min_size=1, max_size=9), st.floats(0.01, 1), st.floats(0, 0.1))
@settings(max_examples=100, deadline=None)
def test_shares_are_in_proportion_above_their_floor(importance, mean, slack):
    importance, floor = np.array(importance), max(0.0, mean - slack)
    shares = proportional(importance, mean, floor)
    assert shares.mean() == pytest.approx(mean)
    assert ((shares >= floor - 1e-12) & (shares <= 1)).all()
    assert shares == pytest.approx(shares_by_hand(importance, mean, floor), abs=1e-6)
    assert (np.diff(shares[np.argsort(importance)]) >= -1e-9).all()


def test_shares_that_no_importance_asks_for_are_dealt_evenly():
    assert proportional(np.zeros(3), 0.4, 0.3).tolist() == pytest.approx([0.4] * 3)
    assert proportional(np.array([1.0, 0, 0]), 0.8, 0.5).tolist() == pytest.approx([1, 0.7, 0.7])


def test_values_that_differ_by_rounding_are_alike():
    assert unit_range(np.array([3.0, 3.0 + 1e-9, 3.0])).tolist() == [0, 0, 0]
    assert unit_range(np.array([2.0, 4.0, 3.0])).tolist() == [0, 1, 0.5]


def test_ecoflap_is_its_formula():
    """A linear loss: what a layer's direction was is read off the params that the loss was given."""
    rng = np.random.default_rng(0)
    gradient = [{n: (i + 1) * rng.standard_normal(TEXT.linear_shape(n)) for n in LINEARS} for i in range(3)]
    kernels, seen = [weights(seed) for seed in range(3)], []

    def loss(index: int, layer: dict) -> float:
        given = {name: np.asarray(layer[PARTS[name]][name]["kernel"], float) for name in LINEARS}
        seen.append((index, given))
        return sum(float((gradient[index][name] * given[name]).sum()) for name in LINEARS)

    got = ecoflap(Evidence(TEXT, 0.6, lambda index: params(kernels[index]), loss=loss))
    assert [index for index, _ in seen] == [0, 0, 1, 1, 2, 2]
    directions = [
        {name: (seen[2 * i][1][name] - seen[2 * i + 1][1][name]) / 2e-3 for name in LINEARS} for i in range(3)
    ]
    slopes = np.array([abs(sum((gradient[i][n] * directions[i][n]).sum() for n in LINEARS)) for i in range(3)])
    expected = 1 - shares_by_hand(slopes, 0.4, 0.3)
    assert got == pytest.approx(np.repeat(expected[:, None], 7, 1), abs=1e-6)
    assert got.max() <= 0.7 + 1e-9


def test_a_direction_is_gaussian_the_same_both_ways_and_unlike_elsewhere():
    dense = params(weights(0))
    up, down = (perturbed(dense, jax.random.key(3), eps) for eps in (0.5, -0.5))
    moved = []
    for name, part in PARTS.items():
        kernel = np.asarray(dense[part][name]["kernel"])
        there, back = (np.asarray(side[part][name]["kernel"]) - kernel for side in (up, down))
        assert there == pytest.approx(-back, abs=1e-5)
        moved.append(there.ravel() / 0.5)
    assert up["norm"] is dense["norm"]
    drawn = np.concatenate(moved)
    assert abs(drawn.mean()) < 4 / math.sqrt(drawn.size)
    assert drawn.std() == pytest.approx(1, abs=0.05)
    firsts = [values[0] for values in moved]
    assert len(set(np.round(firsts, 3).tolist())) == 7


def test_weights_of_16_bits_stay_such():
    dense = params(weights(0), jnp.bfloat16)
    kernel, moved = dense["mlp"]["up"]["kernel"], perturbed(dense, jax.random.key(0), 0.5)["mlp"]["up"]["kernel"]
    assert moved.dtype == jnp.bfloat16
    assert np.std(np.asarray(moved, float) - np.asarray(kernel, float)) == pytest.approx(0.5, abs=0.05)


def test_sensitivity_is_the_slope_along_the_direction():
    """Of a sum of squares, whose difference both ways is exact: a difference to one side would add eps |z|^2."""
    key, dense = jax.random.key(5), params(weights(0))

    def kernels(layer: dict) -> np.ndarray:
        return np.concatenate([np.asarray(layer[part][n]["kernel"], float).ravel() for n, part in PARTS.items()])

    z = kernels(perturbed(dense, key, 1.0)) - kernels(dense)
    got = sensitivity(lambda index, layer: float((kernels(layer) ** 2).sum()), 0, dense, key, eps=0.5)
    assert got == pytest.approx(abs(2 * (kernels(dense) * z).sum()), rel=1e-4)


def test_ecoflap_keeps_more_where_the_loss_is_steeper_whatever_the_seed():
    """All layers alike, and the loss a multiple of one slope: what differs by seed is the direction alone."""

    def loss(index: int, layer: dict) -> float:
        norm = sum(float((layer[PARTS[name]][name]["kernel"] ** 2).sum()) for name in LINEARS)
        return norm * (1, 1000)[index]

    alike = Evidence(dataclasses.replace(TEXT, layers=2), 0.5, lambda index: params(weights(0)), loss=loss)
    for seed in range(3):
        sparsities = ecoflap(dataclasses.replace(alike, seed=seed))[:, 0]
        assert sparsities[0] > sparsities[1]
    first, again, other = (ecoflap(dataclasses.replace(alike, seed=seed)).tolist() for seed in (0, 0, 1))
    assert first == again != other
