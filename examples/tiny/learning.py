"""The model's first parameters, the two losses and the optimizer."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from examples.tiny import house
from examples.vqa.packing import layout
from examples.vqa.training import is_matrix, stages
from lmmjax import llava
from lmmjax.config import from_hf

CONFIG = from_hf(house.config_json())
SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")


def initial_params(seed: int) -> dict[str, Any]:
    """Returns the model's random parameters and those of the classifier of the first stage."""
    model, head = jax.random.split(jax.random.key(seed))
    return {
        "model": llava.init(CONFIG, model),
        "head": 0.02 * jax.random.normal(head, (CONFIG.text.width, len(SHAPES) + len(COLOURS))),
    }


@functools.cache
def make_optimizer(rate: float, look_steps: int, steps: int) -> optax.GradientTransformation:
    """Returns AdamW with clipped gradients; each stage warms up and decays on its own."""
    schedule = stages((look_steps, steps), rate)
    return optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.05, mask=is_matrix)
    )


def looking_loss(params: dict, pixels: Float[Array, "r c y x"], labels: Int[Array, "r 2"]) -> Float[Array, ""]:
    """Returns the cross-entropy of shape and colour (-1: unknown), read off the mean image token by one matrix.

    What the mean holds, a decoder finds with the flat attention that it starts from.
    """
    scores = llava.encode_images(CONFIG, params["model"], pixels).mean(1) @ params["head"]
    shape, colour = jnp.split(scores, [len(SHAPES)], axis=-1)
    total = jnp.zeros(())
    for logits, label in ((shape, labels[:, 0]), (colour, labels[:, 1])):
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(label, 0))
        total += jnp.mean(losses * (label >= 0))
    return total


def answering_loss(
    params: dict, pixels: Float[Array, "r c y x"], tokens: Int[Array, "r t"], is_answer: Bool[Array, "r q l"]
) -> Float[Array, ""]:
    """Returns the mean cross-entropy of the answers' tokens, their ends included."""
    logits, targets = answer_logits(params["model"], pixels, tokens, is_answer)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return jnp.sum(losses * is_answer[..., 1:]) / jnp.sum(is_answer)


def answer_logits(
    params: llava.Params, pixels: Float[Array, "r c y x"], tokens: Int[Array, "r t"], is_answer: Bool[Array, "r q l"]
) -> tuple[Float[Array, "r q n v"], Int[Array, "r q n"]]:
    """Returns, for all tokens of each block but its first, the logits that predict them and the tokens."""
    rows, questions, block = is_answer.shape
    prefix = tokens.shape[1] - questions * block
    positions, mask = (jnp.asarray(each)[None] for each in layout(prefix, block, questions))
    x = llava.embed(CONFIG, params, tokens, llava.encode_images(CONFIG, params, pixels))
    states = llava.forward(CONFIG, params, x, positions, mask)[:, prefix:].reshape(rows, questions, block, -1)
    return llava.logits(CONFIG, params, states[:, :, :-1]), tokens[:, prefix:].reshape(is_answer.shape)[..., 1:]


@jax.jit
def judge(
    params: llava.Params, pixels: Float[Array, "r c y x"], tokens: Int[Array, "r t"], is_answer: Bool[Array, "r q l"]
) -> Bool[Array, "r q"]:
    """Returns whether every token of an answer, its end included, is the likeliest: greedy decoding's exact match."""
    logits, targets = answer_logits(params, pixels, tokens, is_answer)
    return jnp.all((logits.argmax(-1) == targets) | ~is_answer[..., 1:], axis=-1)
