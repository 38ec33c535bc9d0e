"""The model's KV cache: two stores a layer and the rows' lengths, all explicit arguments and results."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, ArrayLike, DTypeLike, Int

from kernels.quantize import Quantizer
from kernels.stores import Dense, Packed, Rounded, Split, Store
from kernels.stores.base import Shape, Side, Visual
from lmmjax.config import TextConfig
from lmmjax.errors import InputError
from lmmjax.plan import CacheFormat, Plan


class Cache(struct.PyTreeNode):
    """All layers' keys and values; row b holds lengths[b] tokens, image tokens where `visual` says so.

    `visual` is there only if a store keeps image tokens apart. `form` is how the stores quantize, `apart` whether the
    plan keeps image tokens apart wherever there is room for any.
    """

    layers: tuple[tuple[Store, Store], ...]
    lengths: Int[Array, "b"]
    visual: Visual = None
    form: CacheFormat = struct.field(pytree_node=False, default=CacheFormat())
    apart: bool = struct.field(pytree_node=False, default=False)

    @property
    def capacity(self) -> int:
        return self.layers[0][0].capacity

    @property
    def nbytes(self) -> int:
        """Bytes of the stores' real buffers (of the planned ones, if the leaves are shapes)."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.layers))

    def rows(self, at: Int[Array, "b"]) -> "Cache":
        """Returns a cache whose rows are these of its own, each as often as it is named: beams, shared beginnings."""
        return jax.tree.map(lambda leaf: leaf[at] if leaf.ndim else leaf, self)

    def crop(self, kept: Int[Array, "b"]) -> "Cache":
        """Returns the cache with only the first tokens of each row; see `Store.crop` for what is exact again."""
        kept = jnp.minimum(kept, self.lengths)
        layers = tuple(tuple(store.crop(self.lengths, kept, self.visual) for store in layer) for layer in self.layers)
        visual = None if self.visual is None else self.visual & (jnp.arange(self.capacity) < kept[:, None])
        return self.replace(layers=layers, lengths=kept, visual=visual)

    def mark(self, visual: Visual, counts: Int[Array, "b"]) -> "Cache":
        """Returns the cache told which of the t tokens that come next are image tokens; None: none of them."""
        if self.visual is None or visual is None:
            return self
        step = jnp.arange(self.capacity) - self.lengths[:, None]
        own = jnp.take_along_axis(visual, jnp.clip(step, 0, visual.shape[1] - 1), axis=1)
        return self.replace(visual=self.visual | (own & (step >= 0) & (step < counts[:, None])))

    def room_left(self, images: Int[ArrayLike, "b"] | int = 0) -> Int[np.ndarray, "b"]:
        """Returns how many more tokens of text each row surely has room for, beside images[b] more image tokens."""
        images, lengths = np.asarray(images), np.asarray(self.lengths)
        left = self.capacity - lengths - images
        for store in self._splits:
            # Sinks may take image tokens, so where these have a part of their own the sinks count for nothing.
            apart, first = store.visual is not None, store.sinks.capacity if store.sinks else 0
            held = lengths - self._seen if apart else lengths + images - first
            left = np.minimum(left, store.text.capacity - held)
        return left

    def check_room(self, counts: Int[ArrayLike, "b"], images: Int[ArrayLike, "b"] | int = 0) -> None:
        """Raises InputError unless every row has room for counts[b] more tokens, images[b] of them image tokens."""
        counts, images = np.asarray(counts), np.asarray(images)
        if self.apart and self.visual is None and np.any(images > 0):
            raise InputError("cache: its plan keeps image tokens apart, but it was made without room for any")
        needed = np.asarray(self.lengths) + counts
        parts = [store.visual.capacity for store in self._splits if store.visual is not None]
        for what, room, there in (
            ("tokens", self.capacity, needed),
            ("image tokens", min(parts, default=self.capacity), self._seen + images),
        ):
            if np.max(there) > room:
                raise InputError(f"cache: full: it has room for {room} {what} a row, {np.max(there)} would be there")
        short = np.max(counts - images - self.room_left(images))
        if short > 0:
            raise InputError(f"cache: full: a row lacks room for {short} tokens of text")

    @property
    def _splits(self) -> list[Split]:
        return [store for layer in self.layers for store in layer if isinstance(store, Split)]

    @property
    def _seen(self) -> Int[np.ndarray, "b"] | int:
        """How many image tokens each row holds that are kept apart."""
        return 0 if self.visual is None else np.asarray(self.visual).sum(1)


def empty_cache(
    text: TextConfig, plan: Plan, batch: int, capacity: int, dtype: str | None = None, images: int = 0
) -> Cache:
    """Returns an empty cache with the plan's bits a layer, as structure: packed bytes, to be deployed.

    Args:
        capacity: tokens a row, rounded up to whole groups.
        dtype: overrides the plan's for exact tokens.
        images: how many of a row's tokens are image tokens at most. Where a plan keeps these apart they have this
            room, text the rest of the capacity.
    """
    form, shape = plan.cache, _shape(text, plan.cache, batch, capacity)
    exact = dtype or form.dtype

    def make(bits: int, side: Side, quantizer: Quantizer, tokens: int, window: int) -> Store:
        part = (*shape[:2], tokens, shape[3])
        return Dense.empty(part, exact) if bits == 16 else Packed.empty(part, bits, side, quantizer, window, exact)

    def store(side: Side, widths: tuple[int, int]) -> Store:
        if widths == (16, 16):
            return Dense.empty(shape, exact)
        room = images if form.keeps_apart(side, *widths) else 0
        return _dealt(make, form, side, shape, exact, widths, _Rooms(shape[2] - room, room))

    layers = tuple(
        (store("keys", layer.widths("keys")), store("values", layer.widths("values"))) for layer in plan.layers
    )
    return _empty(layers, form, shape).replace(apart=plan.splits_images)


def empty_search_cache(
    text: TextConfig,
    form: CacheFormat,
    key_bits: Int[Array, "l"],
    value_bits: Int[Array, "l"],
    batch: int,
    capacity: int,
    visual_key_bits: Int[Array, "l"] | None = None,
    visual_value_bits: Int[Array, "l"] | None = None,
) -> Cache:
    """Returns an empty cache that computes the same numbers with the bits as data, so one program serves all."""
    shape = _shape(text, form, batch, capacity)

    def make(bits: Int[Array, ""], side: Side, quantizer: Quantizer, tokens: int, window: int) -> Store:
        return Rounded.empty((*shape[:2], tokens, shape[3]), bits, quantizer, window, form.dtype)

    def store(side: Side, index: int, bits: Int[Array, "l"], visual_bits: Int[Array, "l"] | None) -> Store:
        apart = visual_bits is not None or form.keeps_apart(side, 2, 2)
        widths = (bits[index], (bits if visual_bits is None else visual_bits)[index])
        return _dealt(make, form, side, shape, form.dtype, widths, _Rooms(shape[2], shape[2] if apart else 0))

    layers = tuple(
        (store("keys", i, key_bits, visual_key_bits), store("values", i, value_bits, visual_value_bits))
        for i in range(text.layers)
    )
    return _empty(layers, form, shape)


def cache_bytes(text: TextConfig, plan: Plan, batch: int, capacity: int, images: int = 0) -> int:
    """Returns the bytes that the plan's cache takes, codes, scales, zeros and windows counted, without making it."""
    return jax.eval_shape(lambda: empty_cache(text, plan, batch, capacity, images=images)).nbytes


class _Rooms(NamedTuple):
    """Tokens that the parts for text (with sinks) and for images have room for."""

    text: int
    images: int


def _dealt(
    make: Callable[..., Store],
    form: CacheFormat,
    side: Side,
    shape: Shape,
    exact: DTypeLike,
    bits: tuple[Any, Any],
    rooms: _Rooms,
) -> Store:
    """Returns a store of these bits for text and image tokens; one without parts where nothing sets them apart."""
    if not (form.sinks or rooms.images):
        return make(bits[0], side, _quantizer(form, side, shape[3]), shape[2], form.window)
    # Sinks may turn out to be image tokens, and then all text lies in its own part.
    text = rooms.text if rooms.images else rooms.text - form.sinks
    return Split(
        text=make(bits[0], side, _quantizer(form, side, shape[3]), _whole(text, form), form.window),
        sinks=Dense.empty((*shape[:2], form.sinks, shape[3]), exact) if form.sinks else None,
        # No window: the latest image tokens are old ones as soon as text follows.
        visual=make(bits[1], side, _quantizer(form, side, shape[3], True), _whole(rooms.images, form), 0)
        if rooms.images
        else None,
        capacity=shape[2],
    )


def _empty(layers: tuple[tuple[Store, Store], ...], form: CacheFormat, shape: Shape) -> Cache:
    apart = any(isinstance(store, Split) and store.visual is not None for layer in layers for store in layer)
    visual = jnp.zeros((shape[0], shape[2]), bool) if apart else None
    return Cache(layers, jnp.zeros(shape[0], jnp.int32), visual, form)


def _quantizer(form: CacheFormat, side: Side, head_dim: int, visual: bool = False) -> Quantizer:
    return form.key_quantizer(head_dim) if side == "keys" else form.value_quantizer(head_dim, visual)


def _shape(text: TextConfig, form: CacheFormat, batch: int, capacity: int) -> Shape:
    return batch, text.kv_heads, _whole(capacity, form), text.head_dim


def _whole(tokens: int, form: CacheFormat) -> int:
    """Returns the tokens rounded up to whole groups, at least one."""
    groups = -(-max(tokens, 1) // form.settled_together)
    return groups * form.settled_together
