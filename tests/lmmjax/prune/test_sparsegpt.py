"""SparseGPT equals naive elimination, with an explicit inverse for every input; and what every update promises."""

import jax.numpy as jnp
import numpy as np
import pytest

from lmmjax.errors import InputError
from lmmjax.prune import sparsegpt
from lmmjax.prune.updates import UPDATES

EVERY = pytest.mark.parametrize("update", UPDATES.values(), ids=UPDATES)


def draw(inputs: int, outputs: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights (in, out), inputs (tokens, in) that depend on each other, and the mean of their outer products."""
    rng = np.random.default_rng(seed)
    mix = np.eye(inputs) + rng.standard_normal((inputs, inputs)) / np.sqrt(inputs)
    x = rng.standard_normal((8 * inputs, inputs)) @ mix * rng.uniform(0.3, 2, inputs)
    return rng.standard_normal((inputs, outputs)).astype(np.float32), x, x.T @ x / len(x)


def eliminate(w, gram, keep=None, choose=None, damping=0.01):
    """The paper's equation 3 as it stands: H^-1 anew for the inputs that are left, whenever one has had its turn.

    `choose` gets an input's number, the weights as they are, and 1 / [H^-1]_cc of each input c when its turn comes; it
    returns the mask from there on, or None.
    """
    w, h = w.astype(np.float64), gram.astype(np.float64)
    dead = np.diag(h) == 0
    h = h / np.diag(h)[~dead].mean() + np.diag(dead.astype(float))
    h += damping * np.diag(h).mean() * np.eye(len(h))
    w[dead] = 0
    inverses = [np.linalg.inv(h[c:, c:]) for c in range(len(h))]
    worth = np.array([1 / inverse[0, 0] for inverse in inverses])
    keep = np.ones(w.shape, bool) if keep is None else keep.copy()
    for c, inverse in enumerate(inverses):
        if choose is not None and (chosen := choose(c, w, worth)) is not None:
            keep[c : c + len(chosen)] = chosen
        gone = np.where(keep[c], 0, w[c])
        w[c:] -= np.outer(inverse[:, 0] / inverse[0, 0], gone)
    return np.where(keep, w, 0), keep


def close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=2e-5)


def random_mask(shape: tuple[int, int], seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).random(shape) < 0.5


@pytest.fixture(scope="module")
def long() -> tuple[np.ndarray, ...]:
    """Weights of 144 inputs, moments, a mask, and the repaired weights."""
    w, _, gram = draw(144, 3)
    keep = random_mask(w.shape)
    return w, gram, keep, eliminate(w, gram, keep)[0]


@pytest.mark.parametrize("block", [8, 12, 64, 128, 144])
def test_a_repair_is_naive_elimination_whatever_the_block(long, block):
    """Blocks that fit and that do not, one that holds all, and errors collected in several chunks and in one."""
    w, gram, keep, expected = long
    factor = sparsegpt.prepare(jnp.float32(gram), "here")
    close(sparsegpt.repair(jnp.asarray(w), factor, jnp.asarray(keep), block), expected)


@pytest.mark.parametrize(("block", "drop"), [(8, 10), (8, 7), (128, 13)])
def test_the_chosen_mask_is_the_lowest_of_each_block(block, drop):
    """20 inputs: the last block of 8 is not whole, and 7 of 20 are no whole weights a block."""
    w, _, gram = draw(20, 6)

    def choose(c, w, worth):
        if c % block:
            return None
        rows = w[c : c + block]
        saliency = (rows**2 * worth[c : c + block, None]).ravel()
        share = drop * 6 * min(c + block, 20) // 20 - drop * 6 * c // 20
        chosen = np.ones(saliency.shape, bool)
        chosen[np.argsort(saliency, kind="stable")[:share]] = False
        return chosen.reshape(rows.shape)

    weight, keep = sparsegpt.choose(jnp.asarray(w), sparsegpt.prepare(jnp.float32(gram), "here"), drop, block)
    expected, mask = eliminate(w, gram, choose=choose)
    np.testing.assert_array_equal(keep, mask)
    close(weight, expected)
    assert (~mask).sum() == drop * 6


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 3), (5, 24)])
def test_a_pattern_is_chosen_by_weights_as_they_are_at_the_groups_turn(n, m):
    w, _, gram = draw(24, 5)

    def choose(c, w, worth):
        if c % m:
            return None
        chosen = np.ones((m, 5), bool)
        order = np.argsort(w[c : c + m] ** 2 * worth[c : c + m, None], axis=0)
        np.put_along_axis(chosen, order[: m - n], False, axis=0)
        return chosen

    factor = sparsegpt.prepare(jnp.float32(gram), "here")
    weight, keep = sparsegpt.choose_pattern(jnp.asarray(w), factor, (n, m))
    expected, mask = eliminate(w, gram, choose=choose)
    np.testing.assert_array_equal(keep, mask)
    close(weight, expected)


def without(gram: np.ndarray, dead: list[int]) -> np.ndarray:
    gram = gram.copy()
    gram[dead] = gram[:, dead] = 0
    return gram


def test_inputs_that_were_always_zero_touch_nothing_else_and_lose_what_was_asked_for_alone():
    w, _, gram = draw(24, 5)
    dead, gram = [2, 7], without(gram, [2, 7])
    keep = random_mask(w.shape)
    ours = sparsegpt.repair(jnp.asarray(w), sparsegpt.prepare(jnp.float32(gram), "here"), jnp.asarray(keep))
    close(np.delete(ours, dead, 0), np.delete(eliminate(w, gram, keep)[0], dead, 0))
    np.testing.assert_array_equal(np.asarray(ours)[dead], np.where(keep, w, 0)[dead])


@pytest.mark.parametrize(("drop", "pattern"), [(6, None), (18, None), (0, (2, 4))])
def test_the_weights_that_are_zero_are_those_that_the_mask_drops(drop, pattern):
    """Half of the inputs are dead, which is more than is to go, or less."""
    w, _, gram = draw(24, 5)
    dead = list(range(0, 24, 2))
    factor = sparsegpt.prepare(jnp.float32(without(gram, dead)), "here")
    weight, keep = UPDATES["sparsegpt"].choose(jnp.asarray(w), factor, drop, pattern)
    np.testing.assert_array_equal(np.asarray(weight) != 0, keep)
    assert (~np.asarray(keep)).sum() == 5 * (drop if pattern is None else 12)
    gone = (~np.asarray(keep))[dead].sum()
    assert gone == min(5 * (drop or 12), 5 * 12)  # what no output depends on goes first


def test_what_the_small_damping_leaves_indefinite_gets_the_larger_one():
    """An eigenvalue of -0.05 times the mean of the diagonal: 0.01 is too little, 0.1 is enough."""
    w, _, gram = draw(24, 5)
    values, vectors = np.linalg.eigh(gram)
    values[0] = -0.05 * (values[1:].sum() / 24)
    gram = vectors * values @ vectors.T
    keep = random_mask(w.shape)
    ours = sparsegpt.repair(jnp.asarray(w), sparsegpt.prepare(jnp.float32(gram), "here"), jnp.asarray(keep))
    close(ours, eliminate(w, gram, keep, damping=0.1)[0])


@EVERY
@pytest.mark.parametrize("gram", [1 - 3 * np.eye(4), np.full((4, 4), np.nan)], ids=["indefinite", "nan"])
def test_an_error_names_the_layer(update, gram):
    gram = np.where(np.eye(4, dtype=bool), 1, gram * 4)
    with pytest.raises(InputError, match=r"^layer 3, q: got .* not positive definite, or not finite.*calibrate"):
        update.prepare(jnp.float32(gram), "layer 3, q")


@EVERY
@pytest.mark.parametrize("drop", [0, 5, 12, 23, 24])
def test_the_count_is_exact_where_scores_are_equal(update, drop):
    w = np.round(draw(24, 5)[0])
    w[3:9] = 0
    weight, keep = update.choose(jnp.asarray(w), update.prepare(jnp.eye(24), "here"), drop)
    assert (~np.asarray(keep)).sum() == 5 * drop
    assert not np.asarray(weight)[~np.asarray(keep)].any()


@EVERY
@pytest.mark.parametrize(("n", "m"), [(2, 4), (3, 6), (1, 8)])
def test_patterns_keep_n_of_each_m(update, n, m):
    """A pattern takes the place of a count."""
    w, _, gram = draw(24, 5)
    weight, keep = update.choose(jnp.asarray(w), update.prepare(jnp.float32(gram), "here"), 3, (n, m))
    assert (np.asarray(keep).reshape(-1, m, 5).sum(1) == n).all()
    assert ((np.asarray(weight) != 0) == np.asarray(keep)).all()


@EVERY
def test_repairs_lower_the_error_of_outputs(update):
    """Of a mask by Wanda's score, and of one of its own."""
    w, x, gram = draw(24, 5)
    score = np.abs(w) * np.sqrt(np.diag(gram))[:, None]
    keep = np.argsort(np.argsort(score, axis=0), axis=0) >= 12
    prepared = update.prepare(jnp.float32(gram), "here")
    repaired = update.repair(jnp.asarray(w), prepared, jnp.asarray(keep))
    chosen, _ = update.choose(jnp.asarray(w), prepared, 12)
    masked, after, own = (np.linalg.norm(x @ (w - np.asarray(y))) for y in (w * keep, repaired, chosen))
    assert max(own, after) < 0.9 * masked
    assert ((np.asarray(repaired) != 0) == keep).all()


@EVERY
def test_the_scale_of_the_second_moments_does_not_matter(update):
    w, _, gram = draw(24, 5)
    gram[3] = gram[:, 3] = 0
    results = [update.choose(jnp.asarray(w), update.prepare(jnp.float32(gram * s), "here"), 9) for s in (1, 4.0**-12)]
    np.testing.assert_array_equal(results[0][0], results[1][0])
    np.testing.assert_array_equal(results[0][1], results[1][1])


@EVERY
def test_weights_keep_their_dtype_and_are_updated_in_float32(update):
    w, _, gram = draw(24, 5)
    prepared, keep = update.prepare(jnp.float32(gram), "here"), jnp.asarray(random_mask(w.shape))
    half = jnp.asarray(w, jnp.bfloat16)
    ours = update.repair(half, prepared, keep)
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_array_equal(ours, update.repair(half.astype(jnp.float32), prepared, keep).astype(jnp.bfloat16))
    assert update.choose(half, prepared, 9)[0].dtype == jnp.bfloat16


@EVERY
def test_inputs_that_are_all_zero_are_no_error(update):
    weight, keep = update.choose(jnp.ones((24, 5)), update.prepare(jnp.zeros((24, 24)), "here"), 4)
    assert (~np.asarray(keep)).sum() == 20
    assert np.isfinite(np.asarray(weight)).all()


@EVERY
@pytest.mark.parametrize(
    ("drop", "pattern", "message"),
    [
        (None, None, "drop: got None for 24 inputs, expected from 0 to all"),
        (25, None, "drop: got 25 for 24 inputs"),
        (-1, None, "drop: got -1 for 24 inputs"),
        (4, (2, 5), "pattern: got 2:5 for 24 inputs"),
        (None, (12, 4), "pattern: got 12:4"),
    ],
)
def test_what_does_not_fit_is_refused(update, drop, pattern, message):
    with pytest.raises(InputError, match=message):
        update.choose(jnp.ones((24, 5)), update.prepare(jnp.eye(24), "here"), drop, pattern)
