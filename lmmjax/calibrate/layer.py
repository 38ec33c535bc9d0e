"""One decoder layer over a batch: what comes out, and what its linears were fed, from the one forward pass there is."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float

from kernels.rope import rotations
from lmmjax.attention import PlainAttention, causal
from lmmjax.calibrate.statistics import LayerStatistics, LinearStatistics, Traits, spread
from lmmjax.calibrate.tokens import Rows, choose, cosine, unit
from lmmjax.config import TextConfig
from lmmjax.layers import Linear
from lmmjax.linears import SHARED
from lmmjax.llava import Params
from lmmjax.text import Attention, DecoderLayer


class Sums(struct.PyTreeNode):
    """What a batch adds to a layer's statistics: sums over the chosen tokens; of traits over tokens or pairs."""

    tokens: Float[Array, ""]
    fed: dict[str, Float[Array, "in"] | Float[Array, "in in"]]
    traits: Float[Array, "2 5"]

    def __add__(self, other: "Sums") -> "Sums":
        return jax.tree.map(jnp.add, self, other)

    @property
    def statistics(self) -> LayerStatistics:
        """The means."""
        means = {name: value / jnp.maximum(self.tokens, 1) for name, value in self.fed.items()}
        fed = {
            name: LinearStatistics(mean) if mean.ndim == 1 else LinearStatistics(jnp.diagonal(mean), mean)
            for name, mean in means.items()
        }
        return LayerStatistics(spread(fed), Traits(*(self.traits[0] / self.traits[1])))


def run(config: TextConfig, layer: Params, rows: Rows) -> Float[Array, "b t e"]:
    """Returns the layer's output, uncompiled: to be traced in a larger function."""
    b, t, _ = rows.x.shape
    positions = jnp.broadcast_to(jnp.arange(t), (b, t))
    rotation = rotations(positions, config.head_dim, config.rope_theta)
    arguments = (rows.x, rotation, PlainAttention(causal(b, t)))
    out, _ = DecoderLayer(config).apply({"params": layer}, *arguments)  # pyright: ignore[reportGeneralTypeIssues]
    return out


@functools.partial(jax.jit, static_argnums=0)
def forward(config: TextConfig, layer: Params, rows: Rows) -> Float[Array, "b t e"]:
    """Returns the layer's output."""
    return run(config, layer, rows)


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def collect(
    config: TextConfig, layer: Params, rows: Rows, choice: str, grams: bool
) -> tuple[Sums, Float[Array, "b t e"]]:
    """Returns what the batch adds to the layer's statistics, and the layer's output."""
    fed: dict[str, Array] = {}
    mixed: list[Array] = []

    def tap(call, args, kwargs, context) -> Any:
        result = call(*args, **kwargs)
        if isinstance(context.module, Linear) and context.module.path[-1] in SHARED:
            fed[context.module.path[-1]] = args[0]
        if isinstance(context.module, Attention):
            mixed.append(result[0])
        return result

    with nn.intercept_methods(tap):
        out = run(config, layer, rows)
    chosen = choose(choice, rows, out)
    measure = _gram if grams else _squares
    sums = {name: measure(x, chosen) for name, x in fed.items()}
    return Sums(chosen.sum().astype(jnp.float32), sums, _traits(rows, rows.x + mixed[0], out)), out


def _squares(x: Float[Array, "b t i"], chosen: Bool[Array, "b t"]) -> Float[Array, "i"]:
    squares, counted = jnp.square(x.astype(jnp.float32)), chosen.astype(jnp.float32)
    return jnp.einsum("bti,bt->i", squares, counted, precision=jax.lax.Precision.HIGHEST)


def _gram(x: Float[Array, "b t i"], chosen: Bool[Array, "b t"]) -> Float[Array, "i i"]:
    kept = jnp.where(chosen[..., None], x, 0).reshape(-1, x.shape[-1]).astype(jnp.float32)
    return jnp.matmul(kept.T, kept, precision=jax.lax.Precision.HIGHEST)


def _traits(rows: Rows, middle: Float[Array, "b t e"], out: Float[Array, "b t e"]) -> Float[Array, "2 5"]:
    """Returns each trait's sum and what it runs over: tokens of drifts, pairs within a sequence of spreads."""
    drifts = [jnp.where(rows.valid, 1 - cosine(a, b), 0).sum() for a, b in ((rows.x, middle), (middle, out))]
    tokens = rows.valid.sum()
    directions = unit(out)
    kinds = [rows.visual, rows.valid & ~rows.visual]
    sums = [jnp.where(kind[..., None], directions, 0).sum(1) for kind in kinds]
    counts = [kind.sum(1) for kind in kinds]
    # Over ordered pairs of two different tokens of unit length: |sum|² counts each token with itself, too.
    within = [n * (n - 1) for n in counts]
    alike = [(s * s).sum(1) - n for s, n in zip(sums, counts, strict=True)]
    spreads = [(pairs - cos).sum() for pairs, cos in zip(within, alike, strict=True)]
    across = counts[0] * counts[1]
    spreads.append((across - (sums[0] * sums[1]).sum(1)).sum())
    totals = [tokens, tokens, within[0].sum(), within[1].sum(), across.sum()]
    return jnp.stack([jnp.stack([*drifts, *spreads]), jnp.stack(totals).astype(jnp.float32)])
