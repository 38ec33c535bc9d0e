"""The model's KV cache: two stores a layer and the rows' lengths, all explicit arguments and results."""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from kernels.attend import attend
from kernels.quantize import Axis
from kernels.reference import Append
from kernels.stores import Dense, Packed, Rounded, Store
from lmmjax.config import TextConfig
from lmmjax.plan import CacheFormat, Plan


class Cache(struct.PyTreeNode):
    """All layers' keys and values; row b holds lengths[b] tokens.

    `round_own` says whether a prompt's own queries see its settled tokens rounded, as later queries will.
    """

    layers: tuple[tuple[Store, Store], ...]
    lengths: Int[Array, "b"]
    round_own: bool = struct.field(pytree_node=False, default=True)

    @property
    def capacity(self) -> int:
        return self.layers[0][0].capacity

    @property
    def nbytes(self) -> int:
        """Bytes of the real buffers (of the planned ones, if the leaves are shapes)."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.layers))


class CachedAttention(struct.PyTreeNode):
    """One layer's attention while new tokens pass: `starts` of them are stored, counts[b] more are real."""

    keys: Store
    values: Store
    starts: Int[Array, "b"]
    counts: Int[Array, "b"]
    round_own: bool = struct.field(pytree_node=False, default=True)
    backend: str | None = struct.field(pytree_node=False, default=None)

    def __call__(
        self, q: Float[Array, "b h t d"], k: Float[Array, "b k t d"], v: Float[Array, "b k t d"]
    ) -> tuple[Float[Array, "b h t d"], tuple[Store, Store]]:
        """Returns the attention of q over the stores with k and v appended, and these stores."""
        keys = self.keys.append(k, self.starts, self.counts)
        values = self.values.append(v, self.starts, self.counts)
        out = attend(
            q,
            keys,
            values,
            self.starts + self.counts,
            starts=self.starts,
            append=Append(k, v, self.keys, self.values),
            round_own=self.round_own,
            backend=self.backend,
        )
        return out, (keys, values)


class PlainAttention(struct.PyTreeNode):
    """Attention among the given tokens alone, without a cache: training and calibration."""

    mask: Bool[Array, "b t t"]

    def __call__(
        self, q: Float[Array, "b h t d"], k: Float[Array, "b k t d"], v: Float[Array, "b k t d"]
    ) -> tuple[Float[Array, "b h t d"], None]:
        """Returns the masked attention of q over k and v; there is nothing to keep."""
        q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
        out = jax.nn.dot_product_attention(q, k, v, mask=self.mask[:, None])
        return out.transpose(0, 2, 1, 3), None


Attend = CachedAttention | PlainAttention


def empty_cache(text: TextConfig, plan: Plan, batch: int, capacity: int, dtype: str | None = None) -> Cache:
    """Returns an empty cache with the plan's bits a layer, as structure: packed bytes, to be deployed.

    `capacity` is in tokens, rounded up to whole groups; `dtype` overrides the plan's for exact tokens.
    """
    form = plan.cache
    shape = _shape(text, form, batch, capacity)

    def store(bits: int, axis: Axis) -> Store:
        if bits == 16:
            return Dense.empty(shape, dtype or form.dtype)
        return Packed.empty(shape, bits, axis, form.group, form.window, dtype or form.dtype)

    layers = tuple((store(layer.key_bits, "tokens"), store(layer.value_bits, "channels")) for layer in plan.layers)
    return Cache(layers, jnp.zeros(batch, jnp.int32), form.quantize_prefill)


def empty_search_cache(
    text: TextConfig,
    form: CacheFormat,
    key_bits: Int[Array, "l"],
    value_bits: Int[Array, "l"],
    batch: int,
    capacity: int,
) -> Cache:
    """Returns an empty cache that computes the same numbers with the bits as data, so one program serves all."""
    shape = _shape(text, form, batch, capacity)

    def store(bits: Int[Array, ""], axis: Axis) -> Store:
        return Rounded.empty(shape, bits, axis, form.group, form.window, form.dtype)

    layers = tuple((store(key_bits[i], "tokens"), store(value_bits[i], "channels")) for i in range(text.layers))
    return Cache(layers, jnp.zeros(batch, jnp.int32), form.quantize_prefill)


def cache_bytes(text: TextConfig, plan: Plan, batch: int, capacity: int) -> int:
    """Returns the bytes that the plan's cache takes, codes, scales, zeros and windows counted, without making it."""
    return jax.eval_shape(lambda: empty_cache(text, plan, batch, capacity)).nbytes


def _shape(text: TextConfig, form: CacheFormat, batch: int, capacity: int) -> tuple[int, int, int, int]:
    return batch, text.kv_heads, -(-capacity // form.group) * form.group, text.head_dim
