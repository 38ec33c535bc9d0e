"""Gradients walked back layer by layer against those of the whole model, and losses against its logits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import CONFIG, encoded

from lmmjax import llava
from lmmjax.calibrate import gradients, walk
from lmmjax.calibrate.loss import Loss
from lmmjax.config import LINEARS
from lmmjax.layered import held
from lmmjax.linears import kernel_of


@pytest.fixture(scope="module")
def params():
    return llava.init(CONFIG, jax.random.key(0))


def whole_loss(params, samples, row):
    """A sample's mean negative log-likelihood of its text, by the model's own forward pass on it alone."""
    length = int(samples.lengths[row])
    return _loss(
        params, jnp.asarray(samples.tokens[row : row + 1, :length]), jnp.asarray(samples.pixels[row : row + 1])
    )


def slopes(params, samples, row):
    length = int(samples.lengths[row])
    return _slopes(params, jnp.asarray(samples.tokens[row : row + 1, :length]), samples.pixels[row : row + 1])


@jax.jit
def _loss(params, tokens, pixels):
    length = tokens.shape[1]
    states = llava.embed(CONFIG, params, tokens, llava.encode_images(CONFIG, params, pixels))
    mask = jnp.tril(jnp.ones((1, length, length), bool))
    states = llava.forward(CONFIG, params, states, jnp.arange(length)[None], mask)
    logits = jax.nn.log_softmax(llava.logits(CONFIG, params, states))[0, :-1]
    text = tokens[0, 1:] != CONFIG.image_token
    nll = -jnp.take_along_axis(logits, tokens[0, 1:, None], axis=-1)[:, 0]
    return jnp.where(text, nll, 0).sum() / text.sum()


_slopes = jax.jit(jax.grad(_loss))


def test_sizes_are_the_means_of_every_samples_gradient(params, tmp_path, monkeypatch):
    samples = encoded(3)
    monkeypatch.setattr(walk, "TOKENS", 32)  # two batches, the second filled up
    model = held(CONFIG, params)
    read: list[int] = []
    counted = dataclasses.replace(model, layer=lambda index: (read.append(index), model.layer(index))[1])
    found = dict(gradients.sizes(counted, walk.embedded(CONFIG, model.outer, samples), tmp_path))
    assert list(found) == [1, 0]
    assert read == [0, 1, 1, 0]  # each layer twice, however many batches there are
    assert not list(tmp_path.iterdir())
    each = [slopes(params, samples, row) for row in range(3)]
    for index, name in ((index, name) for index in found for name in LINEARS):
        mean = sum(abs(kernel_of(slope["text"][f"layers_{index}"], name)) for slope in each) / 3
        np.testing.assert_allclose(found[index][name], mean, rtol=2e-3, atol=1e-6, err_msg=name)


def test_the_loss_with_a_layer_replaced_is_that_of_the_whole_model(params):
    samples = encoded(3)
    model = held(CONFIG, params)
    loss = Loss(model, walk.embedded(CONFIG, model.outer, samples))
    for index in range(CONFIG.text.layers):
        halved = jax.tree.map(lambda leaf: leaf / 2, model.layer(index))
        changed = params | {"text": params["text"] | {f"layers_{index}": halved}}
        expected = np.mean([whole_loss(changed, samples, row) for row in range(3)])
        np.testing.assert_allclose(loss(index, halved), expected, rtol=1e-4)
        np.testing.assert_allclose(
            loss(index, model.layer(index)), np.mean([whole_loss(params, samples, row) for row in range(3)]), rtol=1e-4
        )
