"""Teacher-forced evaluation: how well known answers are predicted, and how far from the dense model's way.

The state at position t - 1 predicts token t, so only the states before the counted tokens meet the vocabulary.
Batches are all of one shape: whatever is compiled for one serves them all.
"""

import dataclasses
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from lmmjax import data, llava
from lmmjax.cache import Cache
from lmmjax.config import LlavaConfig
from lmmjax.data import Encoded
from lmmjax.errors import InputError
from lmmjax.llava import Params

LogProbs = Float[Array, "b n v"]


@struct.dataclass
class Batch:
    """Samples ready for the decoder; n is the largest number of counted tokens a row.

    `visual` says which of the embeddings are image tokens, `at` are the positions of the counted tokens, `targets` the
    tokens there. `counted` says which of the n are real, `answers` which belong to the answer.
    """

    x: Float[Array, "b t e"]
    visual: Bool[Array, "b t"]
    lengths: Int[Array, "b"]
    at: Int[Array, "b n"]
    targets: Int[Array, "b n"]
    counted: Bool[Array, "b n"]
    answers: Bool[Array, "b n"]


@struct.dataclass
class Sums:
    """Per sample: sums over its counted tokens, their number, and whether the greedy answer is the known one."""

    kl: Float[Array, "b"]
    nll: Float[Array, "b"]
    tokens: Int[Array, "b"]
    correct: Bool[Array, "b"]


@dataclasses.dataclass(frozen=True)
class Result:
    """An evaluation, sample by sample; the means are over tokens, the accuracies over samples."""

    sums: Sums
    kinds: tuple[str, ...]

    @property
    def kl(self) -> float:
        """Mean KL divergence in nats a token, from the reference's predictions to these."""
        return float(np.sum(self.sums.kl) / np.sum(self.sums.tokens))

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood in nats a token."""
        return float(np.sum(self.sums.nll) / np.sum(self.sums.tokens))

    @property
    def ppl(self) -> float:
        """Perplexity: e to the mean negative log-likelihood."""
        return math.exp(self.nll)

    @property
    def accuracy(self) -> float:
        """Share of samples of which every answer token, greedily chosen, is the known answer's."""
        return float(np.mean(self.sums.correct))

    @property
    def by_kind(self) -> dict[str, float]:
        """Accuracy of each kind of question."""
        kinds = np.array(self.kinds)
        return {kind: float(np.mean(self.sums.correct[kinds == kind])) for kind in sorted(set(self.kinds))}


def batches(
    config: LlavaConfig, params: Params, encoded: Encoded, size: int = 32, tokens: str = "answer"
) -> Iterator[Batch]:
    """Yields the samples in batches of `size`, the last filled up with rows that count nothing.

    `tokens` are those to be predicted: the answer's, or all of the text's. Images and token embeddings are
    computed here: pruning touches neither.

    Raises:
        InputError: an unknown choice of tokens, or no sample.
    """
    if tokens not in ("answer", "text"):
        raise InputError(f"tokens: got {tokens!r}, expected answer or text")
    samples = len(encoded.tokens)
    if not samples:
        raise InputError("evaluation: got no samples, expected at least one")
    wanted = encoded.is_answer if tokens == "answer" else _text(config, encoded)
    width = int(wanted.sum(1).max())
    for rows, real in data.batches(samples, size):
        at = np.argsort(~wanted[rows], axis=1, kind="stable")[:, :width]
        counted = np.take_along_axis(wanted[rows], at, 1) & real[:, None]
        yield Batch(
            x=llava.embed_prompts(config, params, encoded.tokens[rows], encoded.lengths[rows], encoded.pixels_of(rows)),
            visual=llava.image_tokens(config, jnp.asarray(encoded.tokens[rows]), jnp.asarray(encoded.lengths[rows])),
            lengths=jnp.asarray(encoded.lengths[rows]),
            at=jnp.asarray(at),
            targets=jnp.asarray(np.take_along_axis(encoded.tokens[rows], at, 1)),
            counted=jnp.asarray(counted),
            answers=jnp.asarray(np.take_along_axis(encoded.is_answer[rows], at, 1) & counted),
        )


def log_probs(config: LlavaConfig, params: Params, cache: Cache, batch: Batch) -> LogProbs:
    """Returns the predictions of a batch's counted tokens; `cache` is empty, of the batch's size, with room."""
    states, _ = llava.extend(config, params, cache, batch.x, batch.lengths, visual=batch.visual)
    return predictions(config, params, states, batch)


def predictions(config: LlavaConfig, params: Params, states: Float[Array, "b t e"], batch: Batch) -> LogProbs:
    """Returns the predictions of a batch's counted tokens from its final states."""
    before = jnp.take_along_axis(states, (batch.at - 1)[..., None], axis=1)
    return jax.nn.log_softmax(llava.logits(config, params, before), axis=-1)


def compare(batch: Batch, reference: LogProbs, predicted: LogProbs) -> Sums:
    """Returns the batch's sums for these predictions, their KL divergence taken from the reference."""
    kl = jnp.sum(jnp.exp(reference) * (reference - predicted), axis=-1)
    nll = -jnp.take_along_axis(predicted, batch.targets[..., None], axis=-1)[..., 0]
    right = jnp.argmax(predicted, axis=-1) == batch.targets
    return Sums(
        kl=jnp.sum(jnp.where(batch.counted, kl, 0), axis=1),
        nll=jnp.sum(jnp.where(batch.counted, nll, 0), axis=1),
        tokens=jnp.sum(batch.counted, axis=1),
        correct=jnp.all(right | ~batch.answers, axis=1),
    )


def gather(parts: list[Sums], encoded: Encoded) -> Result:
    """Returns the result of all batches' sums, the rows that filled up the last one left out."""
    host = jax.device_get(parts)
    whole = jax.tree.map(lambda *leaves: np.concatenate(leaves)[: len(encoded.kinds)], *host)
    return Result(whole, encoded.kinds)


def _text(config: LlavaConfig, encoded: Encoded) -> Bool[np.ndarray, "b t"]:
    """Returns which tokens are text that something precedes."""
    position = np.arange(encoded.tokens.shape[1])
    inside = (position > 0) & (position < encoded.lengths[:, None])
    return inside & ~config.is_image(encoded.tokens)
