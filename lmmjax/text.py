"""The Llama / Vicuna decoder. How attention is computed, and over what, is the caller's argument."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels.rope import Rotation, rotations
from lmmjax.attention import Attend
from lmmjax.config import TextConfig
from lmmjax.layers import Linear, RMSNorm, leaf, linears


class Attention(nn.Module):
    """Rotary self-attention; query heads share kv heads in equal groups."""

    config: TextConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b t e"], rotation: Rotation, attend: Attend) -> tuple[Array, Any]:
        config = self.config

        def heads(y: Float[Array, "b t hd"]) -> Float[Array, "b h t d"]:
            return y.reshape(*x.shape[:2], -1, config.head_dim).transpose(0, 2, 1, 3)

        wide, narrow = config.heads * config.head_dim, config.kv_heads * config.head_dim
        q, k, v = map(heads, linears(self, x, q=wide, k=narrow, v=narrow))
        mixed, kept = attend(q, k, v, rotation)
        merged = mixed.transpose(0, 2, 1, 3).reshape(*x.shape[:2], -1)
        return Linear(config.width, name="o")(merged), kept


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    config: TextConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b t e"]) -> Float[Array, "b t e"]:
        gate, up = linears(self, x, gate=self.config.ffn, up=self.config.ffn)
        return Linear(self.config.width, name="down")(jax.nn.silu(gate) * up)


class DecoderLayer(nn.Module):
    """Attention and MLP, each after an RMSNorm and added to the stream."""

    config: TextConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b t e"], rotation: Rotation, attend: Attend) -> tuple[Array, Any]:
        normed = RMSNorm(self.config.eps, name="attn_norm")(x)
        mixed, kept = Attention(self.config, name="attn")(normed, rotation, attend)
        x = x + mixed
        return x + GatedMLP(self.config, name="mlp")(RMSNorm(self.config.eps, name="mlp_norm")(x)), kept


class Decoder(nn.Module):
    """Token embeddings, decoder layers in a plain loop, and the vocabulary's logits."""

    config: TextConfig

    def setup(self):
        config = self.config
        self.embedding = leaf(self, "embedding", nn.initializers.normal(0.02), (config.vocab, config.width))
        self.layers = [DecoderLayer(config) for _ in range(config.layers)]
        self.norm = RMSNorm(config.eps)
        if not config.tied:
            self.lm_head = Linear(config.vocab)

    def embed(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t e"]:
        """Returns the embeddings; a placeholder beyond the vocabulary takes any row, to be overwritten."""
        return self.embedding.take(tokens, axis=0, mode="clip")

    def __call__(
        self, x: Float[Array, "b t e"], positions: Int[Array, "b t"], attends: Sequence[Attend]
    ) -> tuple[Float[Array, "b t e"], tuple[Any, ...]]:
        """Returns the normed final states, and what each layer's attention keeps."""
        rotation = rotations(positions, self.config.head_dim, self.config.rope_theta)
        kept = []
        for layer, attend in zip(self.layers, attends, strict=True):
            x, keep = layer(x, rotation, attend)
            kept.append(keep)
        return self.norm(x), tuple(kept)

    def logits(self, states: Float[Array, "*b e"]) -> Float[Array, "*b v"]:
        """Returns float32 logits of final states."""
        logits = states @ self.embedding.T if self.config.tied else self.lm_head(states)
        return logits.astype(jnp.float32)
