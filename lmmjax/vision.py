"""The CLIP vision tower, and the choice of its features that the language model sees."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lmmjax.config import VisionConfig
from lmmjax.layers import ACTIVATIONS, Linear


class VisionAttention(nn.Module):
    """Full self-attention among the patches of one image; scores and softmax in float32."""

    config: VisionConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b p e"]) -> Float[Array, "b p e"]:
        width, heads = self.config.width, self.config.heads

        def split(name: str) -> Float[Array, "b p h d"]:
            return Linear(width, use_bias=True, name=name)(x).reshape(*x.shape[:2], heads, width // heads)

        q, k, v = split("q"), split("k"), split("v")
        scores = jnp.einsum("bphd,bshd->bhps", q, k).astype(jnp.float32) * (width // heads) ** -0.5
        weights = jax.nn.softmax(scores, -1).astype(x.dtype)
        mixed = jnp.einsum("bhps,bshd->bphd", weights, v).reshape(x.shape)
        return Linear(width, use_bias=True, name="o")(mixed)


class VisionLayer(nn.Module):
    """A pre-norm transformer layer: attention, then a two-matrix MLP."""

    config: VisionConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b p e"]) -> Float[Array, "b p e"]:
        config = self.config
        norm_1 = nn.LayerNorm(epsilon=config.eps, use_fast_variance=False, name="norm_1")
        norm_2 = nn.LayerNorm(epsilon=config.eps, use_fast_variance=False, name="norm_2")
        x = x + VisionAttention(config, name="attn")(norm_1(x))
        hidden = Linear(config.ffn, use_bias=True, name="up")(norm_2(x))
        return x + Linear(config.width, use_bias=True, name="down")(ACTIVATIONS[config.activation](hidden))


class VisionTower(nn.Module):
    """The hidden states that `config.feature_layers` name, side by side, without post-norm.

    State 0 is the embedding after the pre-norm, state i the output of layer i - 1. Layers that no feature
    needs are not run, though a checkpoint keeps their weights. Source: CLIP, arXiv:2103.00020.
    """

    config: VisionConfig

    @nn.compact
    def __call__(self, pixels: Float[Array, "b c y x"]) -> Float[Array, "b p f"]:
        config = self.config
        x = Linear(config.width, name="patch_embed")(patchify(pixels, config.patch_size))
        init = nn.initializers.normal(0.02)
        cls = self.param("class_embed", init, (config.width,))
        x = jnp.concatenate([jnp.broadcast_to(cls, (x.shape[0], 1, config.width)).astype(x.dtype), x], axis=1)
        x = x + self.param("position_embed", init, (config.patches + 1, config.width))
        states = [nn.LayerNorm(epsilon=config.eps, use_fast_variance=False, name="pre_norm")(x)]
        for layer in range(max(config.feature_layers)):
            states.append(VisionLayer(config, name=f"layers_{layer}")(states[-1]))
        features = jnp.concatenate([states[layer] for layer in config.feature_layers], axis=-1)
        return features if config.keep_class_token else features[:, 1:]


def patchify(pixels: Float[Array, "b c y x"], size: int) -> Float[Array, "b p i"]:
    """Returns non-overlapping patches in reading order, each flattened as (channel, row, column)."""
    b, c, y, x = pixels.shape
    grid = pixels.reshape(b, c, y // size, size, x // size, size)
    return grid.transpose(0, 2, 4, 1, 3, 5).reshape(b, -1, c * size * size)
