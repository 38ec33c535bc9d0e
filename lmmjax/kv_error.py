"""What rounding one layer's keys or values costs: the error of its attention, and the loss's first-order change.

Both are taken on whole samples at the exact model: a layer is rounded by itself, and what it is fed is exact. So they
take one pass forward and one back a batch, whatever the number of layers and widths.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from kernels.rope import Rotation, rotate
from lmmjax import likelihood, llava
from lmmjax.attention import PlainAttention, causal
from lmmjax.config import LlavaConfig
from lmmjax.data import Encoded
from lmmjax.kv_rounding import Sides, given_back, positions, turned
from lmmjax.likelihood import Batch
from lmmjax.llava import Llava, Params
from lmmjax.plan import BITS, CacheFormat

SIDES = ("keys", "values")
WIDTHS = tuple(bits for bits in BITS if bits < 16)
"""The widths that are measured, the widest first."""


class Seen(NamedTuple):
    """What one layer's attention was given, without RoPE."""

    q: Float[Array, "b h t d"]
    kv: Sides


class Probed(struct.PyTreeNode):
    """PlainAttention over keys and values with a probe added to each, by which they can be differentiated."""

    mask: Bool[Array, "b t t"]
    probe: Sides

    def __call__(
        self, q: Float[Array, "b h t d"], k: Float[Array, "b k t d"], v: Float[Array, "b k t d"], rotation: Rotation
    ) -> tuple[Float[Array, "b h t d"], Seen]:
        """Returns the masked attention of q over the probed k and v, and what went into it."""
        kv = Sides(k + self.probe.keys, v + self.probe.values)
        return PlainAttention(self.mask)(q, *kv, rotation)[0], Seen(q, kv)


class LayerSums(NamedTuple):
    """One layer's sums, sample by sample.

    `output` is the exact attention's squared norm, `error` that of its difference under rounding, both over all heads
    and the positions that are no padding; `change` is the sum of |dx * dloss/dx| over heads, tokens and channels.
    """

    output: Float[Array, "b"]
    error: Float[Array, "w 2 b"]
    change: Float[Array, "w 2 b"]


class Sums(NamedTuple):
    """A batch's samples: each one's mean negative log-likelihood, and every layer's sums."""

    nll: Float[Array, "b"]
    layers: tuple[LayerSums, ...]


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """Both measures by side ("keys", "values"): a row a layer, a column a width of `WIDTHS`.

    `error` is ||attention under rounding - exact attention|| / ||exact attention||, both Frobenius norms over all
    samples, heads and counted positions. `change`, in nats a token, is the mean over samples of
    sum |dx * dloss/dx| over a sample's heads, tokens and channels, where dx = rounded - exact, as the attention reads
    them (keys after RoPE), and the loss is the sample's mean negative log-likelihood over its answer's tokens.
    `loss` is its mean over samples.

    Source: PM-KVQ, arXiv:2505.18610 (its code takes the mean over elements; the sum bounds the change from above).
    """

    loss: float
    error: Mapping[str, Float[np.ndarray, "l w"]]
    change: Mapping[str, Float[np.ndarray, "l w"]]


def sums(config: LlavaConfig, params: Params, encoded: Encoded, form: CacheFormat, size: int = 8) -> Iterator[Sums]:
    """Yields the sums of `size` samples at a time; all batches are of one shape, so two programs serve them.

    Held at once: every layer's queries, keys, values and slopes of one batch, next to the backward pass's own.
    """
    for batch in likelihood.batches(config, params, encoded, size):
        nll, seen, slopes = gradients(config, params, batch)
        layers = [layer_sums(config, form, *layer, batch) for layer in zip(seen, slopes, strict=True)]
        yield _of_samples(Sums(nll, tuple(layers)), batch)


def gather(parts: Sequence[Sums]) -> Sensitivity:
    """Returns the measures over all batches' samples."""
    whole = jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=-1), *parts)

    def by_side(measure: Callable[[LayerSums], Any]) -> dict[str, Float[np.ndarray, "l w"]]:
        tables = np.stack([measure(layer) for layer in whole.layers])  # (l, w, 2)
        return {side: tables[..., i] for i, side in enumerate(SIDES)}

    return Sensitivity(
        loss=float(whole.nll.mean()),
        error=by_side(lambda layer: np.sqrt(layer.error.sum(-1) / layer.output.sum())),
        change=by_side(lambda layer: layer.change.mean(-1)),
    )


@functools.partial(jax.jit, static_argnums=0)
def gradients(config: LlavaConfig, params: Params, batch: Batch) -> tuple[Array, tuple[Seen, ...], tuple[Sides, ...]]:
    """Returns each sample's loss, what every layer's attention was given, and the slopes by its keys and values."""
    text = config.text
    nothing = jnp.zeros((batch.x.shape[0], text.kv_heads, batch.x.shape[1], text.head_dim), batch.x.dtype)
    probes = (Sides(nothing, nothing),) * text.layers
    slopes, (nll, seen) = jax.grad(loss, has_aux=True)(probes, config, params, batch)
    return nll, seen, slopes


def loss(
    probes: tuple[Sides, ...], config: LlavaConfig, params: Params, batch: Batch
) -> tuple[Float[Array, ""], tuple[Float[Array, "b"], tuple[Seen, ...]]]:
    """Returns the sum of the samples' losses, so that a sample's slope is that of its own; these losses; and `Seen`."""
    attends = [Probed(causal(*batch.x.shape[:2]), probe) for probe in probes]
    decode: Any = functools.partial(Llava(config).apply, method=Llava.decode)
    states, seen = decode({"params": params}, batch.x, positions(batch), attends)
    predicted = likelihood.predictions(config, params, states, batch)
    compared = likelihood.compare(batch, predicted, predicted)
    nll = compared.nll / jnp.maximum(compared.tokens, 1)
    return nll.sum(), (nll, seen)


@functools.partial(jax.jit, static_argnums=(0, 1))
def layer_sums(config: LlavaConfig, form: CacheFormat, seen: Seen, slopes: Sides, batch: Batch) -> LayerSums:
    """Returns one layer's sums at every width, in float32; the width is data, so one program serves all layers."""
    q, kv, slopes = jax.tree.map(lambda x: x.astype(jnp.float32), (*seen, slopes))
    turn = llava.turn(config, positions(batch))
    q, exact, slopes = rotate(q, turn), turned(kv, turn), turned(slopes, turn)
    counted = (jnp.arange(q.shape[2]) < batch.lengths[:, None])[:, None, :, None]

    def attend(kv: Sides) -> Float[Array, "b h t d"]:
        return PlainAttention(causal(*batch.x.shape[:2]))(q, *kv, (jnp.ones(1), jnp.zeros(1)))[0]

    def squares(x: Float[Array, "b h t d"]) -> Float[Array, "b"]:
        return jnp.sum(jnp.where(counted, jnp.square(x), 0), axis=(1, 2, 3))

    def at(bits: Int[Array, ""]) -> tuple[Array, Array]:
        held = given_back(config, form, bits, kv, batch)
        mixed = (attend(Sides(held.keys, exact.values)), attend(Sides(exact.keys, held.values)))
        moved = [jnp.where(counted, (x - old) * slope, 0) for x, old, slope in zip(held, exact, slopes, strict=True)]
        return jnp.stack([squares(x - out) for x in mixed]), jnp.stack([jnp.abs(x).sum((1, 2, 3)) for x in moved])

    out = attend(exact)
    return LayerSums(squares(out), *jax.lax.map(at, jnp.array(WIDTHS)))


def _of_samples(found: Sums, batch: Batch) -> Sums:
    """Returns the sums in float64 on the host, without the rows that only fill the batch up: those count nothing."""
    real = np.flatnonzero(batch.counted.any(1))
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64)[..., real], found)
