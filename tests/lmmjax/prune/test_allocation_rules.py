"""Allocations by statistics and weights equal their published formulas, derived again in float64."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from lmmjax.calibrate.statistics import LayerStatistics, LinearStatistics, Traits
from lmmjax.config import LINEARS, TextConfig
from lmmjax.prune.allocations import Evidence, wish
from lmmjax.prune.allocations.alphapruning import hill_alpha, spectrum

TEXT = TextConfig(vocab=8, width=24, ffn=40, layers=3, heads=4, kv_heads=2, head_dim=6, context=16)
PARTS = {name: "attn" if name in ("q", "k", "v", "o") else "mlp" for name in LINEARS}


def weights(seed: int) -> dict[str, np.ndarray]:
    """One layer's weights, (in, out), with a few large ones among them."""
    rng = np.random.default_rng(seed)
    return {name: rng.standard_t(2 + seed, TEXT.linear_shape(name)).astype(np.float32) for name in LINEARS}


def params(kernels: dict[str, np.ndarray]) -> dict:
    layer = {"attn": {}, "mlp": {}}
    for name, kernel in kernels.items():
        layer[PARTS[name]][name] = {"kernel": jnp.asarray(kernel)}
    return layer


def evidence(sparsity: float, kernels=(), x_sq=(), traits=()) -> Evidence:
    inputs = x_sq or [{}] * TEXT.layers
    traits = traits or [Traits(*[np.nan] * 5)] * TEXT.layers
    stats = [
        LayerStatistics({name: LinearStatistics(jnp.asarray(x, jnp.float32)) for name, x in layer.items()}, trait)
        for layer, trait in zip(inputs, traits, strict=True)
    ]
    return Evidence(TEXT, sparsity, lambda index: params(kernels[index]), stats)


def owl_by_hand(kernels, x_sq, sparsity: float, m: float, lamda: float) -> np.ndarray:
    """All scores ||X_j|| |W_ij| of a layer in one list; D is the percentage of them above M times their mean."""
    shares = []
    for layer, inputs in zip(kernels, x_sq, strict=True):
        scores = [np.abs(layer[name].astype(float)) * np.sqrt(inputs[name])[:, None] for name in LINEARS]
        scores = np.concatenate([score.ravel() for score in scores])
        shares.append(100 * np.mean(scores > m * scores.mean()))
    shares = np.array(shares)
    density = (shares - shares.min()) / (shares.max() - shares.min()) * 2 * lamda
    return 1 - (density - density.mean() + 1 - sparsity)


def draw_inputs(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.gamma(0.3, size=TEXT.linear_shape(name)[0]) for name in LINEARS}


@pytest.mark.parametrize(("sparsity", "seed"), [(0.5, 0), (0.7, 7)])
def test_owl_is_its_formula(sparsity, seed):
    kernels, x_sq = [weights(i) for i in (2, 0, 1)], [draw_inputs(seed + i) for i in range(3)]
    expected = owl_by_hand(kernels, x_sq, sparsity, 5, 0.08)
    assert np.ptp(expected) == pytest.approx(0.16)
    assert wish("owl", evidence(sparsity, kernels, x_sq)) == pytest.approx(np.repeat(expected[:, None], 7, 1))


def test_owl_keeps_most_where_outliers_are_most():
    """All weights alike but for a share of large ones, which grows from layer to layer."""
    kernels = []
    for share in (0.0, 0.01, 0.03):
        layer = {name: np.ones(TEXT.linear_shape(name), np.float32) for name in LINEARS}
        layer["up"].ravel()[: int(share * layer["up"].size)] = 100
        kernels.append(layer)
    ones = [{name: np.ones(TEXT.linear_shape(name)[0]) for name in LINEARS}] * 3
    sparsities = wish("owl", evidence(0.6, kernels, ones))[:, 0]
    assert (np.diff(sparsities) < 0).all()
    assert sparsities.mean() == pytest.approx(0.6)


def alpha_by_hand(kernel: np.ndarray) -> float:
    """Hill's estimator over the squared singular values from the median up."""
    squares = np.sort(np.linalg.svd(kernel.astype(float), compute_uv=False) ** 2)
    start = len(squares) // 2
    logs = [math.log(value) for value in squares[start:]]
    return 1 + len(logs) / (sum(logs) - len(logs) * logs[0])


def test_alphapruning_is_its_formula():
    kernels = [weights(seed) for seed in (1, 0, 4)]
    alphas = np.array([np.mean([alpha_by_hand(kernel) for kernel in layer.values()]) for layer in kernels])
    ratio = 0.7 + 0.6 * (alphas - alphas.min()) / (alphas.max() - alphas.min())
    expected = ratio * 0.6 / ratio.mean()
    got = wish("alphapruning", evidence(0.6, kernels))
    assert got == pytest.approx(np.repeat(expected[:, None], 7, 1), rel=1e-4)
    assert (np.argsort(got[:, 0]) == np.argsort(alphas)).all()


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (9, 9)])
def test_the_smaller_gram_matrix_has_the_spectrum(shape):
    kernel = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    expected = np.sort(np.linalg.svd(kernel.astype(float), compute_uv=False) ** 2)
    assert spectrum(jnp.asarray(kernel)) == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("alpha", [2.0, 3.5, 6.0])
def test_hill_finds_the_exponent_of_a_power_law(alpha):
    """Quantiles of a Pareto density x^-alpha: the estimate of 4000 is within two percent."""
    quantiles = (1 - (np.arange(4000) + 0.5) / 4000) ** (-1 / (alpha - 1))
    assert hill_alpha(quantiles) == pytest.approx(alpha, rel=0.02)
    assert hill_alpha(7 * quantiles) == pytest.approx(hill_alpha(quantiles))


def test_das_is_its_formula():
    spreads = np.array([[0.2, 0.5, 0.4], [0.9, 0.7, 0.8], [0.05, 0.1, 0.3]])
    traits = [Traits(np.nan, np.nan, *row) for row in spreads]
    importance = spreads.mean(axis=1)
    expected = 1 - (0.3 + 0.1 * 3 * importance / importance.sum())  # .1 a layer above the floor of .3; none is full
    assert wish("das", evidence(0.6, traits=traits)) == pytest.approx(np.repeat(expected[:, None], 7, 1))


def test_das_without_images_goes_by_the_text():
    text = np.array([0.5, 0.7, 0.1])
    traits = [Traits(np.nan, np.nan, np.nan, value, np.nan) for value in text]
    expected = 1 - (0.3 + 0.3 * text / text.sum())
    assert wish("das", evidence(0.6, traits=traits))[:, 3] == pytest.approx(expected)
    some = [Traits(np.nan, np.nan, *row) for row in ([0.4, 0.6, 0.5], [np.nan, 0.5, np.nan], [0.5, np.nan, np.nan])]
    assert wish("das", evidence(0.6, traits=some)) == pytest.approx(np.full((3, 7), 0.6))


def test_mgaa_is_its_formula():
    drift = np.array([[0.5, 0.3], [0.1, 0.02], [0.2, 0.9]])
    p = np.exp(drift) / np.exp(drift).sum()
    size = [sum(math.prod(TEXT.linear_shape(n)) for n in LINEARS if PARTS[n] == part) for part in ("attn", "mlp")]
    density = 0.4 * p / ((p * size).sum() / (3 * sum(size)))
    traits = [Traits(*row, np.nan, np.nan, np.nan) for row in drift]
    got = wish("mgaa", evidence(0.6, traits=traits))
    assert got == pytest.approx(1 - density[:, [0, 0, 0, 0, 1, 1, 1]])
    kept = sum((1 - got[:, i]).sum() * math.prod(TEXT.linear_shape(name)) for i, name in enumerate(LINEARS))
    assert kept / (3 * sum(size)) == pytest.approx(0.4)


def test_mgaa_of_like_sublayers_is_uniform_though_their_sizes_differ():
    traits = [Traits(0.3, 0.3, np.nan, np.nan, np.nan)] * 3
    assert wish("mgaa", evidence(0.6, traits=traits)) == pytest.approx(np.full((3, 7), 0.6))
