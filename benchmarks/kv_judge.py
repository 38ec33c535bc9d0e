"""What a quantized cache or other weights cost one model: questions about images and windows of text, in one prefill.

Both go teacher-forced through the search's cache, whose widths are data: a program a format, whatever the widths.
Queries see what is rounded, those of the prefill too.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from lmmjax import likelihood, llava
from lmmjax.attention import causal
from lmmjax.cache import empty_cache, empty_search_cache
from lmmjax.checkpoint import Checkpoint
from lmmjax.config import LlavaConfig
from lmmjax.data import Encoded
from lmmjax.likelihood import Batch, LogProbs, Sums
from lmmjax.llava import Params
from lmmjax.perplexity import Window
from lmmjax.plan import CacheFormat, LayerPlan, Plan
from lmmjax.prompt import pad

TEXTS = 2
"""Windows of text at once: their logits are 100 MB a window of 512 tokens and 49k words."""


class Widths(NamedTuple):
    """Bits of every layer, as data; those of image tokens only where they differ."""

    keys: Int[np.ndarray, "l"]
    values: Int[np.ndarray, "l"]
    visual_keys: Int[np.ndarray, "l"] | None = None
    visual_values: Int[np.ndarray, "l"] | None = None


class Judge:
    """Judges caches on the same questions and windows, against the dense model's predictions."""

    def __init__(self, model: Checkpoint, questions: Encoded, windows: Sequence[Window], batch: int = 16):
        self._model, self._questions = model, questions
        self._batches = {
            "questions": list(likelihood.batches(model.config, model.params, questions, batch)),
            "text": list(_text_batches(model.config, model.params, windows)),
        }
        layers = model.config.text.layers
        exact = CacheFormat(dtype="float32"), Widths(np.full(layers, 16), np.full(layers, 16))
        self._reference = {name: [self._predict(*exact, one) for one in of] for name, of in self._batches.items()}

    def __call__(self, form: CacheFormat | None, widths: Widths | None) -> dict[str, Any]:
        """Returns what a cache is worth; None is the dense one."""
        if form is None or widths is None:
            return self._figures(None)
        return self._figures(lambda one: self._predict(form, widths, one))

    def weights(self, params: Params) -> dict[str, Any]:
        """Returns what other weights are worth, without any cache."""
        return self._figures(lambda one: _predict_plainly(self._model.config, params, one))

    def _figures(self, predict: Callable[[Batch], LogProbs] | None) -> dict[str, Any]:
        """Returns the figures of these predictions; None predicts as the dense model does."""
        sums = {
            name: [
                _compare(one, known, known if predict is None else predict(one))
                for one, known in zip(of, self._reference[name], strict=True)
            ]
            for name, of in self._batches.items()
        }
        questions = likelihood.gather(sums["questions"], self._questions)
        figures = {"right": questions.accuracy, "by_kind": questions.by_kind, "kl": questions.kl}
        if not sums["text"]:
            return figures
        text: Sums = jax.tree.map(lambda *parts: float(np.sum(parts)), *jax.device_get(sums["text"]))
        return {**figures, "text_kl": text.kl / text.tokens, "ppl": float(np.exp(text.nll / text.tokens))}

    def _predict(self, form: CacheFormat, widths: Widths, batch: Batch) -> LogProbs:
        arrays = jax.tree.map(lambda bits: jnp.asarray(bits, jnp.int32), widths)
        return _predict(self._model.config, form, self._model.params, arrays, batch)


def sizes(model: Checkpoint, form: CacheFormat, widths: Widths, tokens: int) -> dict[str, float]:
    """Returns bits a value of a cache that holds so many tokens: of codes, scales and exact tokens, and all.

    The image tokens of one picture are among them where they are kept apart.
    """
    text = model.config.text
    visual = (widths.keys if widths.visual_keys is None else widths.visual_keys,)
    visual += (widths.values if widths.visual_values is None else widths.visual_values,)
    columns = zip(widths.keys.tolist(), widths.values.tolist(), *(bits.tolist() for bits in visual), strict=True)
    layers = (LayerPlan(k, v, visual_key_bits=vk, visual_value_bits=vv) for k, v, vk, vv in columns)
    plan, images = Plan(tuple(layers), cache=form), model.config.image_tokens
    cache = jax.eval_shape(lambda: empty_cache(text, plan, 1, tokens, images=images))
    values = 2 * text.layers * text.kv_heads * text.head_dim * tokens
    parts = [store.sizes for layer in cache.layers for store in layer]
    found = {kind: 8 * sum(part[kind] for part in parts) / values for kind in parts[0]}
    return {**found, "all": sum(found.values())}


def _text_batches(config: LlavaConfig, params: Params, windows: Sequence[Window]):
    """Yields windows as batches of which every token but a window's first is counted."""
    longest = max((len(window.tokens) for window in windows), default=0)
    for start in range(0, len(windows), TEXTS):
        chosen = windows[start : start + TEXTS]
        rows = [list(window.tokens) for window in chosen] + [[0]] * (TEXTS - len(chosen))
        tokens, lengths = pad(rows, longest)
        at = np.broadcast_to(np.arange(1, longest), (TEXTS, longest - 1))
        first = np.array([window.first for window in chosen] + [longest] * (TEXTS - len(chosen)))
        counted = (at < lengths[:, None]) & (at >= first[:, None])
        yield Batch(
            x=llava.embed(config, params, jnp.asarray(tokens)),
            visual=jnp.zeros(tokens.shape, bool),
            lengths=jnp.asarray(lengths),
            at=jnp.asarray(at),
            targets=jnp.asarray(tokens[:, 1:]),
            counted=jnp.asarray(counted),
            answers=jnp.asarray(counted),
        )


@functools.partial(jax.jit, static_argnames=("config", "form"))
def _predict(config: LlavaConfig, form: CacheFormat, params: Params, bits: Any, batch: Batch) -> LogProbs:
    """Returns the predictions through a cache of this format. Traced once a format and shape of batch."""
    size, length = batch.x.shape[:2]
    keys, values, *visual = bits
    cache = empty_search_cache(config.text, form, keys, values, size, length, *visual)
    return likelihood.log_probs(config, params, cache, batch)


@functools.partial(jax.jit, static_argnums=0)
def _predict_plainly(config: LlavaConfig, params: Params, batch: Batch) -> LogProbs:
    """Returns the predictions of whole sequences, each token among those before it."""
    size, length = batch.x.shape[:2]
    positions = jnp.broadcast_to(jnp.arange(length), (size, length))
    states = llava.forward(config, params, batch.x, positions, causal(size, length))
    return likelihood.predictions(config, params, states, batch)


_compare = jax.jit(likelihood.compare)
