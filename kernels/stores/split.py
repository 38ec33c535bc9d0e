"""A store that deals a row's tokens to parts: the first few exact, and image tokens kept otherwise than text."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from kernels.stores.base import Store, Visual, take, within
from kernels.stores.dense import Dense


class Deal(NamedTuple):
    """Where one part's tokens lie: which positions are its own, and how many of these come before each position."""

    own: Bool[Array, "b s"]
    before: Int[Array, "b s1"]

    def count(self, lengths: Int[Array, "b *t"]) -> Int[Array, "b *t"]:
        """Returns how many of the first tokens of each row are the part's."""
        return jax.vmap(lambda before, n: jnp.take(before, n, mode="clip"))(self.before, lengths)

    def pick(
        self, new: Float[Array, "b h t d"], starts: Int[Array, "b"], counts: Int[Array, "b"]
    ) -> tuple[Float[Array, "b h t d"], Int[Array, "b"]]:
        """Returns the part's own of the tokens that come after `starts`, in front of the others, and their number."""
        capacity, at = self.own.shape[1], starts[:, None] + jnp.arange(new.shape[2])
        real = (at < (starts + counts)[:, None]) & (at < capacity)
        mine = real & jnp.take_along_axis(self.own, jnp.minimum(at, capacity - 1), axis=1)
        return take(new, jnp.argsort(~mine, axis=1, stable=True)), mine.sum(1)


class Split(struct.PyTreeNode):
    """The first tokens (attention sinks) in `sinks`, image tokens in `visual` if that exists, all others in `text`.

    Every part is a store with a length and a window of its own: its tokens in order, wherever in the row they stood.
    Source: sinks, StreamingLLM, arXiv:2309.17453; two formats by modality, VidKV, arXiv:2503.16257.
    """

    text: Store
    sinks: Dense | None = None
    visual: Store | None = None
    capacity: int = struct.field(pytree_node=False, default=0)

    @property
    def exact(self) -> bool:
        return all(part.exact for part in self.parts.values())

    @property
    def dtype(self) -> DTypeLike:
        return self.text.dtype

    @property
    def sizes(self) -> dict[str, int]:
        sizes = [part.sizes for part in self.parts.values()]
        return {kind: sum(size[kind] for size in sizes) for kind in sizes[0]}

    def append(
        self,
        new: Float[Array, "b h t d"],
        starts: Int[Array, "b"],
        counts: Int[Array, "b"],
        visual: Visual = None,
        into: Callable[..., Store] = lambda part, *arrays: part.append(*arrays),
    ) -> "Split":
        """Returns the store with the new tokens dealt to its parts; `into` is how a part takes its own."""
        parts = {}
        for name, deal in self.deals(visual, starts.shape[0]).items():
            own, number = deal.pick(new, starts, counts)
            parts[name] = into(self.parts[name], own, deal.count(starts), number)
        return self.replace(**parts)

    def read(self, lengths: Int[Array, "b"], visual: Visual = None) -> Float[Array, "b h s d"]:
        whole = jnp.zeros((), jnp.float32)
        for name, deal in self.deals(visual, lengths.shape[0]).items():
            held = take(self.parts[name].read(deal.count(lengths)), deal.before[:, :-1])
            whole = jnp.where(deal.own[:, None, :, None], held, whole)
        return jnp.where(within(lengths, self.capacity), whole, 0)

    def rounded(self, ages: Int[Array, "b t"], visual: Visual = None) -> Bool[Array, "b t s"]:
        seen = jnp.zeros((*ages.shape, self.capacity), bool)
        for name, deal in self.deals(visual, ages.shape[0]).items():
            inside = self.parts[name].rounded(deal.count(ages))
            index = jnp.minimum(deal.before[:, :-1], inside.shape[-1] - 1)
            seen |= deal.own[:, None] & jax.vmap(lambda x, i: jnp.take(x, i, axis=-1))(inside, index)
        return seen

    def crop(self, lengths: Int[Array, "b"], kept: Int[Array, "b"], visual: Visual = None) -> "Split":
        deals = self.deals(visual, lengths.shape[0])
        cropped = {name: self.parts[name].crop(deal.count(lengths), deal.count(kept)) for name, deal in deals.items()}
        return self.replace(**cropped)

    @property
    def parts(self) -> dict[str, Store]:
        """The stores that tokens are dealt to, by name."""
        parts = {"sinks": self.sinks, "text": self.text, "visual": self.visual}
        return {name: part for name, part in parts.items() if part is not None}

    def deals(self, visual: Visual, batch: int) -> dict[str, Deal]:
        """Returns every part's share of the positions."""
        if self.visual is not None and visual is None:
            raise ValueError("visual: got None; this store keeps image tokens apart and must be told which they are")
        first = jnp.arange(self.capacity) < (self.sinks.capacity if self.sinks is not None else 0)
        is_image = jnp.zeros((batch, 1), bool) if self.visual is None or visual is None else visual
        own = {"sinks": first, "visual": ~first & is_image, "text": ~first & ~is_image}
        return {name: _deal(jnp.broadcast_to(own[name], (batch, self.capacity))) for name in self.parts}


def _deal(own: Bool[Array, "b s"]) -> Deal:
    return Deal(own, jnp.pad(jnp.cumsum(own, axis=1, dtype=jnp.int32), ((0, 0), (1, 0))))
