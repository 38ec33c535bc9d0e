"""Calibration: what each linear of the decoder is fed, taken layer by layer on image-and-text samples."""

from collections.abc import Callable, Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from kernels.rope import rotations
from lmmjax import llava
from lmmjax.attention import PlainAttention
from lmmjax.config import LlavaConfig
from lmmjax.data import Encoded
from lmmjax.errors import InputError
from lmmjax.layers import Linear
from lmmjax.llava import Params
from lmmjax.text import DecoderLayer

LayerStatistics = dict[str, Float[Array, "in"]]
"""For each of a layer's seven linears, the mean square of every input over the chosen tokens."""
Transform = Callable[[int, Params, LayerStatistics], Params]

BATCH = 32


def statistics(
    config: LlavaConfig, params: Params, encoded: Encoded, tokens: str = "all"
) -> tuple[LayerStatistics, ...]:
    """Returns every layer's statistics, all of the model as it stands (one-shot).

    `tokens` chooses over which positions the mean runs: all that are no padding, or of these only text.
    """
    collected: list[LayerStatistics] = []

    def keep(index: int, layer: Params, stats: LayerStatistics) -> Params:
        collected.append(stats)
        return layer

    transform_layers(config, params, encoded, keep, tokens)
    return tuple(collected)


def transform_layers(
    config: LlavaConfig, params: Params, encoded: Encoded, transform: Transform, tokens: str = "all"
) -> Params:
    """Returns params with each decoder layer replaced by transform(index, layer, its statistics).

    Sequential: a layer's statistics are taken behind the layers that were replaced before it. All hidden
    states are held, (samples, t, e) in the parameters' dtype; the weights in use are those of one layer.
    """
    if tokens not in ("all", "text"):
        raise InputError(f"calibration tokens: got {tokens!r}, expected all or text")
    text = dict(params["text"])
    batches = list(_embedded(config, params, encoded, tokens))
    for index in range(config.text.layers):
        name = f"layers_{index}"
        sums = [_layer_sums(config, text[name], *batch) for batch in batches]
        total = jax.tree.map(lambda *parts: sum(parts), *sums)
        count = sum(int(chosen.sum()) for _, _, chosen in batches)
        text[name] = transform(index, text[name], {linear: value / count for linear, value in total.items()})
        batches = [(_layer(config, text[name], x, mask), mask, chosen) for x, mask, chosen in batches]
    return params | {"text": text}


def _embedded(
    config: LlavaConfig, params: Params, encoded: Encoded, tokens: str
) -> Iterator[tuple[Array, Array, Array]]:
    """Yields batches of (embeddings, attention mask, chosen positions), the last filled up with empty rows."""
    samples, length = encoded.tokens.shape
    causal = np.tril(np.ones((length, length), bool))
    for start in range(0, samples, BATCH):
        rows = np.arange(start, start + BATCH)
        real = rows < samples
        rows = np.minimum(rows, samples - 1)
        valid = (np.arange(length) < encoded.lengths[rows, None]) & real[:, None]
        chosen = valid if tokens == "all" else valid & (encoded.tokens[rows] != config.image_token)
        x = llava.embed_prompts(config, params, encoded.tokens[rows], encoded.lengths[rows], encoded.pixels[rows])
        yield x, jnp.broadcast_to(causal, (BATCH, length, length)), jnp.asarray(chosen)


def _run_layer(config: LlavaConfig, layer: Params, x: Float[Array, "b t e"], mask: Bool[Array, "b t t"]) -> Array:
    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    rotation = rotations(positions, config.text.head_dim, config.text.rope_theta)
    arguments = (x, rotation, PlainAttention(mask))
    out, _ = DecoderLayer(config.text).apply({"params": layer}, *arguments)  # pyright: ignore[reportGeneralTypeIssues]
    return out


_layer = jax.jit(_run_layer, static_argnums=0)


@jax.jit
def _squares(x: Float[Array, "b t i"], chosen: Bool[Array, "b t"]) -> Float[Array, "i"]:
    return jnp.einsum("bti,bt->i", jnp.square(x.astype(jnp.float32)), chosen.astype(jnp.float32))


def _collect(config: LlavaConfig, layer: Params, x: Array, mask: Array, chosen: Array) -> LayerStatistics:
    """Returns the sums of squares over the chosen positions, tapped from the one forward pass there is."""
    sums: LayerStatistics = {}

    def tap(call, args, kwargs, context):
        if isinstance(context.module, Linear):
            sums[context.module.path[-1]] = _squares(args[0], chosen)
        return call(*args, **kwargs)

    with nn.intercept_methods(tap):
        _run_layer(config, layer, x, mask)
    return sums


_layer_sums = jax.jit(_collect, static_argnums=0)
