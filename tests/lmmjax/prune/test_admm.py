"""ADMM equals the paper's algorithms in their own letters, and comes near the least squares that it is after."""

import jax.numpy as jnp
import numpy as np
import pytest

from lmmjax.prune import admm


def draw(inputs: int, outputs: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Weights (in, out), and inputs (tokens, in) that depend on each other."""
    rng = np.random.default_rng(seed)
    mix = np.eye(inputs) + rng.standard_normal((inputs, inputs)) / np.sqrt(inputs)
    x = rng.standard_normal((8 * inputs, inputs)) @ mix * rng.uniform(0.3, 2, inputs)
    return rng.standard_normal((inputs, outputs)).astype(np.float32), x


def solver(x: np.ndarray) -> admm.Solver:
    return admm.prepare(jnp.float32(x.T @ x / len(x)), "here")


def algorithm(w, x, mask, choose=None, lamda=0.1, rho=1, k=20, k_s=15):
    """Algorithms 1 and 2 in float64, letters as there; `choose` makes a mask of the share that is gone and W + U."""
    norm = np.linalg.norm(x, axis=0) + 1e-8
    w, x = w.astype(np.float64) * norm[:, None], x / norm
    xx = x.T @ x
    xx = xx + lamda * np.diag(xx).mean() * np.eye(len(xx))
    inverse, xy, u = np.linalg.inv(xx + rho * np.eye(len(xx))), xx @ w, np.zeros(w.shape)
    for t in range(1, k + 1):
        if choose is not None and t <= k_s:
            mask = choose(1 - (1 - t / k_s) ** 3, w + u)
        z = mask * (w + u)
        u = u + (w - z)
        w = inverse @ (xy + rho * (z - u))
    return mask * (w + u) / norm[:, None], mask


def without_lowest(size: np.ndarray, count: float) -> np.ndarray:
    mask = np.ones(size.size, bool)
    mask[np.argsort(size.ravel(), kind="stable")[: int(count + 1e-6)]] = False
    return mask.reshape(size.shape)


def close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=1e-4)


def test_a_repair_is_algorithm_1():
    w, x = draw(24, 7)
    mask = np.random.default_rng(1).random(w.shape) < 0.5
    close(admm.repair(jnp.asarray(w), solver(x), jnp.asarray(mask)), algorithm(w, x, mask)[0])


@pytest.mark.parametrize("drop", [7, 15])
def test_the_mask_grows_as_a_cubic_over_the_whole_matrix(drop):
    w, x = draw(24, 7)
    expected, mask = algorithm(w, x, None, lambda share, aim: without_lowest(np.abs(aim), share * drop * 7))
    weight, keep = admm.choose(jnp.asarray(w), solver(x), drop)
    np.testing.assert_array_equal(keep, mask)
    close(weight, expected)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 6)])
def test_a_growing_pattern_never_touches_the_best_of_a_group(n, m):
    w, x = draw(24, 7)

    def choose(share, aim):
        size = np.abs(aim)
        groups = size.reshape(-1, m, 7)
        safe = (np.argsort(np.argsort(groups, axis=1), axis=1) >= m - n).reshape(size.shape)
        return without_lowest(np.where(safe, np.inf, size), share * (m - n) * w.size // m)

    expected, mask = algorithm(w, x, None, choose)
    weight, keep = admm.choose_pattern(jnp.asarray(w), solver(x), (n, m))
    np.testing.assert_array_equal(keep, mask)
    close(weight, expected)


def test_a_repair_comes_near_the_least_squares_of_its_mask():
    """Each output alone has a closed form: the regression of what it was on the inputs that stay."""
    w, x = draw(40, 8)
    mask = np.random.default_rng(2).random(w.shape) < 0.5
    best = np.zeros(w.shape)
    for output in range(8):
        kept = mask[:, output]
        best[kept, output] = np.linalg.lstsq(x[:, kept], x @ w[:, output], rcond=None)[0]
    repaired = np.asarray(admm.repair(jnp.asarray(w), solver(x), jnp.asarray(mask)))
    least, ours, masked = (np.linalg.norm(x @ (w - y)) for y in (best, repaired, w * mask))
    assert least <= ours < 1.01 * least < 0.8 * masked


def test_weights_of_inputs_that_were_always_zero_go_first_and_stay_as_they_are_otherwise():
    w, x = draw(24, 7)
    x[:, [2, 7]] = 0
    prepared = solver(x)
    keep = admm.choose(jnp.asarray(w), prepared, 2)[1]
    assert not np.asarray(keep)[[2, 7]].any()
    ours = admm.repair(jnp.asarray(w), prepared, jnp.ones(w.shape, bool))
    close(ours, w)
