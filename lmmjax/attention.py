"""What one layer's attention does with new queries, keys and values: over a cache, or among themselves."""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from kernels import hadamard
from kernels.append import append
from kernels.attend import attend
from kernels.reference import Append
from kernels.rope import Rotation, rotate
from kernels.stores import Store
from kernels.stores.base import Visual
from lmmjax.plan import CacheFormat


class CachedAttention(struct.PyTreeNode):
    """One layer's attention while new tokens pass: `starts` of them are stored, counts[b] more are real.

    `turn` is the rotary embedding of all positions, needed where keys are kept before it.
    """

    keys: Store
    values: Store
    starts: Int[Array, "b"]
    counts: Int[Array, "b"]
    visual: Visual = None
    turn: Rotation | None = None
    form: CacheFormat = struct.field(pytree_node=False, default=CacheFormat())
    backend: str | None = struct.field(pytree_node=False, default=None)

    def __call__(
        self, q: Float[Array, "b h t d"], k: Float[Array, "b k t d"], v: Float[Array, "b k t d"], rotation: Rotation
    ) -> tuple[Float[Array, "b h t d"], tuple[Store, Store]]:
        """Returns the attention of q over the stores with k and v appended, and these stores.

        q and k come without RoPE; `rotation` is that of the new tokens. What is exact anyway is not turned.
        """
        q, k, turn = self._turned(q, k, rotation)
        online = self.form.rotate_values == "online" and not self.values.exact
        v = _hadamard(v) if online else v
        rows = self.starts, self.counts, self.visual
        keys, values = append(self.keys, k, *rows), append(self.values, v, *rows)
        out = attend(
            q,
            keys,
            values,
            self.starts + self.counts,
            starts=self.starts,
            visual=self.visual,
            append=Append(k, v, self.keys, self.values),
            turn=turn,
            round_own=self.form.quantize_prefill,
            backend=self.backend,
        )
        return _hadamard(out) if online else out, (keys, values)

    def _turned(self, q: Array, k: Array, rotation: Rotation) -> tuple[Array, Array, Rotation | None]:
        """Returns queries as they meet the stored keys, keys as they are stored, and what these still lack."""
        q = rotate(q, rotation)
        if self.form.keys == "before_rope" and not self.keys.exact:
            return q, k, self.turn
        k = rotate(k, rotation)
        if self.form.rotate_keys and not self.keys.exact:
            return _hadamard(q), _hadamard(k), None
        return q, k, None


class PlainAttention(struct.PyTreeNode):
    """Attention among the given tokens alone, without a cache: training and calibration."""

    mask: Bool[Array, "b t t"]

    def __call__(
        self, q: Float[Array, "b h t d"], k: Float[Array, "b k t d"], v: Float[Array, "b k t d"], rotation: Rotation
    ) -> tuple[Float[Array, "b h t d"], None]:
        """Returns the masked attention of q over k and v; there is nothing to keep."""
        q, k, v = (x.transpose(0, 2, 1, 3) for x in (rotate(q, rotation), rotate(k, rotation), v))
        out = jax.nn.dot_product_attention(q, k, v, mask=self.mask[:, None])
        return out.transpose(0, 2, 1, 3), None


Attend = CachedAttention | PlainAttention


def causal(b: int, t: int) -> Bool[Array, "b t t"]:
    """Returns the mask of b sequences whose tokens each see themselves and those before."""
    return jnp.broadcast_to(jnp.tril(jnp.ones((t, t), bool)), (b, t, t))


def _hadamard(x: Float[Array, "b h t d"]) -> Float[Array, "b h t d"]:
    return hadamard.rotate(x).astype(x.dtype)
