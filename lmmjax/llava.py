"""LLaVA: images become tokens of the language model. One Flax module, used through pure functions over params."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels.rope import Rotation, rotations
from lmmjax.attention import CachedAttention, PlainAttention, causal
from lmmjax.cache import Cache
from lmmjax.config import LlavaConfig
from lmmjax.layers import ACTIVATIONS, Linear
from lmmjax.text import Decoder
from lmmjax.vision import VisionTower

Params = dict[str, Any]
"""Nested dicts of arrays: {"vision": ..., "projector": ..., "text": {"layers_0": ...}}; kernels are (in, out).

Of a decoder alone there is only "text".
"""


class Projector(nn.Module):
    """Two linears that turn vision features into embeddings. Source: LLaVA 1.5, arXiv:2310.03744."""

    config: LlavaConfig

    @nn.compact
    def __call__(self, features: Float[Array, "n p f"]) -> Float[Array, "n p e"]:
        width, bias = self.config.text.width, self.config.projector_bias
        hidden = Linear(width, bias, name="linear_1")(features)
        return Linear(width, bias, name="linear_2")(ACTIVATIONS[self.config.projector_activation](hidden))


class Llava(nn.Module):
    """The whole model. Its methods are reached with `apply(..., method=...)` by the functions below."""

    config: LlavaConfig

    def setup(self):
        if self.config.vision is not None:
            self.vision = VisionTower(self.config.vision)
            self.projector = Projector(self.config)
        self.text = Decoder(self.config.text)

    def see(self, pixels: Float[Array, "n c y x"]) -> Float[Array, "n p f"]:
        return self.vision(pixels)

    def project(self, features: Float[Array, "n p f"]) -> Float[Array, "n p e"]:
        return self.projector(features)

    def embed(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t e"]:
        return self.text.embed(tokens)

    def decode(self, x: Float[Array, "b t e"], positions: Int[Array, "b t"], attends) -> tuple[Array, Any]:
        return self.text(x, positions, attends)

    def logits(self, states: Float[Array, "*b e"]) -> Float[Array, "*b v"]:
        return self.text.logits(states)

    def __call__(self, tokens: Int[Array, "b t"], pixels: Float[Array, "n c y x"]) -> Float[Array, "b t v"]:
        """Every part once, so that `init` makes every parameter."""
        b, t = tokens.shape
        x = self.embed(tokens)
        if self.config.sees:
            x = merge(self.config, tokens, x, self.project(self.see(pixels)))
        positions = jnp.broadcast_to(jnp.arange(t), (b, t))
        states, _ = self.decode(x, positions, [PlainAttention(causal(b, t))] * self.config.text.layers)
        return self.logits(states)


def init(config: LlavaConfig, key: Array) -> Params:
    """Returns random parameters in float32."""
    pixels = jnp.zeros((1, *config.image_shape))
    tokens = jnp.full((1, max(1, config.image_tokens)), config.image_token or 0)
    return jax.jit(Llava(config).init)(key, tokens, pixels)["params"]


def shapes(config: LlavaConfig, dtype: str = "float32") -> Params:
    """Returns shapes in the place of all weights that a checkpoint of this config holds.

    They include what no forward pass needs: the tower's layers behind the last feature, and its post-norm.
    """
    vision, norm = config.vision, {}
    if vision is not None:
        last = (vision.layers,) * len(vision.feature_layers)  # so that every layer is run
        config = dataclasses.replace(config, vision=dataclasses.replace(vision, feature_layers=last))
        norm = {"post_norm": dict.fromkeys(("scale", "bias"), jax.ShapeDtypeStruct((vision.width,), dtype))}
    tree = {name: {**part, **norm} if name == "vision" else part for name, part in _made(config).items()}
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), tree)


@functools.cache
def _made(config: LlavaConfig) -> dict[str, Any]:
    """Returns the shapes of what `init` makes; tracing a whole model takes a while, and converters ask often."""
    return jax.eval_shape(lambda: init(config, jax.random.key(0)))


def encode_images(config: LlavaConfig, params: Params, pixels: Float[Array, "n c y x"]) -> Float[Array, "n p e"]:
    """Returns the embeddings of n images, p tokens each."""
    return project(config, params, see(config, params, pixels))


def see(config: LlavaConfig, params: Params, pixels: Float[Array, "n c y x"]) -> Float[Array, "n p f"]:
    """Returns the vision tower's features of n images, before the projector."""
    return _apply(config, params, Llava.see, pixels)


def project(config: LlavaConfig, params: Params, features: Float[Array, "n p f"]) -> Float[Array, "n p e"]:
    """Returns the embeddings that the projector makes of features."""
    return _apply(config, params, Llava.project, features)


def embed(
    config: LlavaConfig,
    params: Params,
    tokens: Int[Array, "b t"],
    images: Float[Array, "n p e"] | None = None,
    lengths: Int[Array, "b"] | None = None,
) -> Float[Array, "b t e"]:
    """Returns the prompt's embeddings, its image tokens replaced by the images in order of appearance.

    `lengths` says where padding begins: it is no image, whatever id it is made of.
    """
    if lengths is not None:
        tokens = jnp.where(jnp.arange(tokens.shape[1]) < lengths[:, None], tokens, -1)
    x = _apply(config, params, Llava.embed, tokens)
    return x if images is None else merge(config, tokens, x, images)


def image_tokens(
    config: LlavaConfig, tokens: Int[Array, "b t"], lengths: Int[Array, "b"] | None = None
) -> Bool[Array, "b t"]:
    """Returns which tokens of right-padded prompts stand for images."""
    real = True if lengths is None else jnp.arange(tokens.shape[1]) < lengths[:, None]
    return config.is_image(tokens) & real


@functools.partial(jax.jit, static_argnums=0)
def embed_prompts(
    config: LlavaConfig,
    params: Params,
    tokens: Int[Array, "b t"],
    lengths: Int[Array, "b"],
    pixels: Float[Array, "n c y x"] | None,
) -> Float[Array, "b t e"]:
    """Returns `embed` of right-padded prompts straight from their images' pixels (None: no images), as one program."""
    images = None if pixels is None else encode_images(config, params, pixels)
    return embed(config, params, tokens, images, lengths)


def extend(
    config: LlavaConfig,
    params: Params,
    cache: Cache,
    x: Float[Array, "b t e"],
    counts: Int[Array, "b"],
    backend: str | None = None,
    visual: Bool[Array, "b t"] | None = None,
) -> tuple[Float[Array, "b t e"], Cache]:
    """Returns the final states of t more embeddings a row, and the cache with counts[b] of them appended.

    Serves prefill (an empty cache), a decode step (t = 1) and everything between; states past a row's count
    mean nothing. `visual` says which of the embeddings are image tokens; None: none. The caller sees to it that the
    cache has room (`Cache.check_room`).
    """
    cache = cache.mark(visual, counts)
    every = turn(config, jnp.arange(cache.capacity)[None]) if cache.form.keys == "before_rope" else None
    attends = [
        CachedAttention(keys, values, cache.lengths, counts, cache.visual, every, cache.form, backend)
        for keys, values in cache.layers
    ]
    positions = cache.lengths[:, None] + jnp.arange(x.shape[1])
    states, layers = _apply(config, params, Llava.decode, x, positions, attends)
    return states, cache.replace(layers=layers, lengths=cache.lengths + counts)


def turn(config: LlavaConfig, positions: Int[Array, "b t"]) -> Rotation:
    """Returns the decoder's rotary embedding of these positions."""
    return rotations(positions, config.text.head_dim, config.text.rope_theta)


def forward(
    config: LlavaConfig,
    params: Params,
    x: Float[Array, "b t e"],
    positions: Int[Array, "b t"],
    mask: Bool[Array, "b t t"],
) -> Float[Array, "b t e"]:
    """Returns the final states of whole sequences without a cache; mask[b, i, j] lets query i see key j."""
    return _apply(config, params, Llava.decode, x, positions, [PlainAttention(mask)] * config.text.layers)[0]


def logits(config: LlavaConfig, params: Params, states: Float[Array, "*b e"]) -> Float[Array, "*b v"]:
    """Returns float32 logits of final states."""
    return _apply(config, params, Llava.logits, states)


def merge(
    config: LlavaConfig, tokens: Int[Array, "b t"], x: Float[Array, "b t e"], images: Float[Array, "n p e"]
) -> Float[Array, "b t e"]:
    """Returns x with the k-th image token of the batch, in reading order, replaced by the k-th image feature."""
    is_image = config.is_image(tokens)
    order = jnp.cumsum(is_image.reshape(-1)).reshape(tokens.shape) - 1
    features = jnp.take(images.reshape(-1, images.shape[-1]), order, axis=0, mode="clip")
    return jnp.where(is_image[..., None], features.astype(x.dtype), x)


def _apply(config: LlavaConfig, params: Params, method, *args) -> Any:
    return Llava(config).apply({"params": params}, *args, method=method)
