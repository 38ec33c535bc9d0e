"""What is trained (a projector and low-rank adapters on a frozen model) and the losses that train it."""

import dataclasses
from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from examples.smol import lora
from examples.vqa.packing import layout
from examples.vqa.training import is_matrix, stages
from lmmjax import llava
from lmmjax.config import LlavaConfig
from lmmjax.llava import Params

TEXT_WEIGHT = 0.2
"""Of the loss on plain text beside that on answers: it keeps the decoder a language model."""


class Frozen(struct.PyTreeNode):
    """The model's parameters without tower and projector, and the size of its embeddings (root mean square)."""

    params: Params
    size: Float[Array, ""]


class Rows(struct.PyTreeNode):
    """Packed sequences; `at` are the answers' tokens, `counted` which of them are real."""

    features: Float[Array, "r p f"]
    tokens: Int[Array, "r t"]
    at: Int[Array, "r n"]
    counted: Bool[Array, "r n"]


@dataclasses.dataclass(frozen=True)
class Objective:
    """The losses of one model, for sequences of so many questions behind a prefix. Hashable: it names a program."""

    config: LlavaConfig
    prefix: int
    questions: int

    def aligning(self, trained: Any, frozen: Frozen, rows: Rows, text: Int[Array, "w t"]) -> Float[Array, ""]:
        """Returns the answers' mean cross-entropy with the decoder as it came, which no text can change."""
        return self._loss(trained["projector"], frozen.params, frozen.size, rows)

    def answering(self, trained: Any, frozen: Frozen, rows: Rows, text: Int[Array, "w t"]) -> Float[Array, ""]:
        """Returns the answers' mean cross-entropy plus TEXT_WEIGHT times that of plain text, adapters in place."""
        params = lora.adapt(frozen.params, trained["lora"])
        answers = self._loss(trained["projector"], params, frozen.size, rows)
        return answers + TEXT_WEIGHT * text_loss(self.config, params, text)

    def right(self, trained: Any, frozen: Frozen, rows: Rows) -> Bool[Array, "r n"]:
        """Returns which of the answers' tokens are the likeliest; what is not counted is right."""
        params = lora.adapt(frozen.params, trained["lora"])
        logits, targets = self._logits(trained["projector"], params, frozen.size, rows)
        return (logits.argmax(-1) == targets) | ~rows.counted

    def _loss(self, projector: Any, params: Params, size: Array, rows: Rows) -> Float[Array, ""]:
        logits, targets = self._logits(projector, params, size, rows)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return jnp.sum(losses * rows.counted) / jnp.sum(rows.counted)

    def _logits(self, projector: Any, params: Params, size: Array, rows: Rows) -> tuple[Array, Array]:
        images = size * llava.project(self.config, {"projector": projector}, rows.features)
        x = llava.embed(self.config, params, rows.tokens, images)
        block = (rows.tokens.shape[1] - self.prefix) // self.questions
        positions, mask = (jnp.asarray(each)[None] for each in layout(self.prefix, block, self.questions))
        states = llava.forward(self.config, params, x, positions, mask)
        before = jnp.take_along_axis(states, (rows.at - 1)[..., None], axis=1)
        return llava.logits(self.config, params, before), jnp.take_along_axis(rows.tokens, rows.at, axis=1)


def text_loss(config: LlavaConfig, params: Params, tokens: Int[Array, "w t"]) -> Float[Array, ""]:
    """Returns the mean cross-entropy of every token but the first of each window."""
    length = tokens.shape[1]
    mask = jnp.tril(jnp.ones((1, length, length), bool))
    states = llava.forward(config, params, llava.embed(config, params, tokens), jnp.arange(length)[None], mask)
    logits = llava.logits(config, params, states[:, :-1])
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]))


def initial_params(config: LlavaConfig, seed: int) -> dict[str, Any]:
    """Returns a projector from normalized features to embeddings of size one, and adapters that change nothing."""
    one, two, three = jax.random.split(jax.random.key(seed), 3)
    width, features = config.text.width, config.tower.width * len(config.tower.feature_layers)

    def linear(key: Array, inputs: int) -> dict[str, Array]:
        return {"kernel": jax.random.normal(key, (inputs, width)) * (2 / inputs) ** 0.5, "bias": jnp.zeros(width)}

    projector = {"linear_1": linear(one, features), "linear_2": linear(two, width)}
    return {"projector": projector, "lora": lora.initial_factors(config, three)}


def make_optimizer(lengths: tuple[int, ...], projector: float, adapters: float) -> optax.GradientTransformation:
    """Returns AdamW with clipped gradients; the adapters stand still in the first stage."""
    still = optax.constant_schedule(0.0)
    late = optax.join_schedules([still, stages(lengths[1:], adapters, warmup=20)], [lengths[0]])
    each = {"projector": stages(lengths, projector, warmup=20), "lora": late}
    kinds: dict[Hashable, optax.GradientTransformation] = {
        name: optax.adamw(rate, b2=0.98, weight_decay=0.01, mask=is_matrix) for name, rate in each.items()
    }
    return optax.chain(optax.clip_by_global_norm(1.0), optax.partition(kinds, {name: name for name in each}))


def fold(projector: Any, mean: ArrayLike, deviation: ArrayLike, size: ArrayLike) -> Any:
    """Returns the projector of plain features and plain embeddings: both scalings moved into its linears."""
    first, second = projector["linear_1"], projector["linear_2"]
    kernel = first["kernel"] / jnp.asarray(deviation)[:, None]
    return {
        "linear_1": {"kernel": kernel, "bias": first["bias"] - mean @ kernel},
        "linear_2": {name: size * leaf for name, leaf in second.items()},
    }


def root_mean_square(x: Array) -> Float[Array, ""]:
    return jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32))))


def answers_at(is_answer: Bool[np.ndarray, "r q l"], prefix: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns where the answers' tokens stand in their sequences, and which of these places are real."""
    rows, questions, block = is_answer.shape
    width = int(is_answer.sum(2).max())
    inside = np.argsort(~is_answer, axis=2, kind="stable")[..., :width]
    at = prefix + np.arange(questions)[:, None] * block + inside
    return at.reshape(rows, -1), np.take_along_axis(is_answer, inside, 2).reshape(rows, -1)
