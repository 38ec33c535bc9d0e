"""Methods on one layer: exact counts, patterns, updates under any score's mask, and combinations that mean nothing."""

import jax
import numpy as np
import pytest
from small import CONFIG, encoded

from lmmjax import calibrate, llava
from lmmjax.config import LINEARS
from lmmjax.errors import InputError
from lmmjax.linears import kernel_of
from lmmjax.prune.losses import measure
from lmmjax.prune.method import NAMES, Method
from lmmjax.prune.scores import SCORES
from lmmjax.prune.updates import UPDATES

DROPS = {name: CONFIG.text.linear_shape(name)[0] // 4 for name in LINEARS} | {"k": 0}


@pytest.fixture(scope="module")
def layer():
    return llava.init(CONFIG, jax.random.key(0))["text"]["layers_0"]


@pytest.fixture(scope="module")
def stats():
    params = llava.init(CONFIG, jax.random.key(0))
    found = calibrate.statistics(CONFIG, params, encoded(16), grams=True)[0]
    # Any positive numbers serve as gradients; test_gradients.py proves real ones.
    slopes = {name: abs(kernel_of(params["text"]["layers_1"], name)) for name in LINEARS}
    return found.replace(linears={name: found[name].replace(gradient=slopes[name]) for name in LINEARS})


@pytest.mark.parametrize("name", NAMES)
def test_every_method_drops_exactly_the_counts(layer, stats, name):
    pruned, found = Method(name).layer(layer, stats, DROPS, "layer 0")
    assert set(found) == set(LINEARS) - {"k"}
    assert kernel_of(pruned, "k") is kernel_of(layer, "k")
    assert pruned["attn_norm"] is layer["attn_norm"]
    for linear, one in found.items():
        outputs = CONFIG.text.linear_shape(linear)[1]
        assert int((~one.keep).sum()) == DROPS[linear] * outputs
        np.testing.assert_array_equal(kernel_of(pruned, linear) == 0, ~one.keep)


@pytest.mark.parametrize("update", UPDATES)
def test_an_update_keeps_the_scores_mask_and_comes_nearer_to_the_output(layer, stats, update):
    _, plain = Method("ria").layer(layer, stats, DROPS, "layer 0")
    _, updated = Method("ria", update).layer(layer, stats, DROPS, "layer 0")
    for linear, one in updated.items():
        np.testing.assert_array_equal(one.keep, plain[linear].keep)
        before, after = (
            measure(0, linear, kernel_of(layer, linear), pruned, stats[linear].gram) for pruned in (plain[linear], one)
        )
        assert before.sparsity == after.sparsity == 0.25
        assert after.error < before.error


def test_errors_are_those_of_the_outputs(layer, stats):
    """||X W - X W'|| / ||X W||, with X any matrix of which the Gram matrix is made."""
    _, found = Method("wanda").layer(layer, stats, DROPS, "layer 0")
    weight, gram = np.float64(kernel_of(layer, "up")), np.float64(stats["up"].gram)
    x = np.linalg.cholesky(gram + 1e-9 * np.eye(len(gram))).T
    off = np.linalg.norm(x @ (weight - np.float64(found["up"].weight))) / np.linalg.norm(x @ weight)
    error = measure(0, "up", kernel_of(layer, "up"), found["up"], stats["up"].gram).error
    np.testing.assert_allclose(error, off, rtol=1e-3)
    assert measure(0, "up", kernel_of(layer, "up"), found["up"], None).error is None


def test_a_linear_that_is_always_zero_loses_nothing(stats):
    zero = np.zeros(CONFIG.text.linear_shape("o"), np.float32)
    pruned = Method("wanda").linear(zero, stats["o"], 4)
    assert measure(0, "o", zero, pruned, stats["o"].gram).error == 0
    alone = measure(0, "o", zero, None, stats["o"].gram)
    assert (alone.sparsity, alone.error) == (0, 0)


@pytest.mark.parametrize("method", [Method("lognorm", pattern=(2, 4)), Method("sparsegpt", pattern=(2, 4))])
def test_a_pattern_takes_the_place_of_counts(layer, stats, method):
    _, found = method.layer(layer, stats, dict.fromkeys(LINEARS, 0), "layer 0")
    assert set(found) == set(LINEARS)
    for one in found.values():
        np.testing.assert_array_equal(one.keep.reshape(-1, 4, one.keep.shape[1]).sum(1), 2)


def test_a_permuted_pattern_holds_in_its_order_and_keeps_more(layer, stats):
    _, plain = Method("wanda", pattern=(2, 4)).layer(layer, stats, DROPS, "layer 0")
    _, permuted = Method("wanda", pattern=(2, 4), permute=True).layer(layer, stats, DROPS, "layer 0")
    for linear, one in permuted.items():
        order = np.asarray(one.order)
        np.testing.assert_array_equal(np.sort(order), np.arange(len(order)))
        np.testing.assert_array_equal(np.asarray(one.keep)[order].reshape(-1, 4, one.keep.shape[1]).sum(1), 2)
        score = SCORES["wanda"].rule(kernel_of(layer, linear), stats[linear])
        assert float((score * one.keep).sum()) >= float((score * plain[linear].keep).sum())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "wander"}, "method: got 'wander'"),
        ({"name": "wanda", "update": "gptq"}, "update: got 'gptq'"),
        ({"name": "admm", "update": "admm"}, "admm updates weights by itself"),
        ({"name": "wanda", "permute": True}, "permute: finds an order of inputs for a pattern"),
    ],
)
def test_what_means_nothing_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        Method(**arguments)
