"""A store of real bytes: codes packed into words, spans and zeros in few bits, the latest tokens exact."""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, DTypeLike, Float, Int, UInt16

from kernels import quantize, words
from kernels.metadata import DTYPES
from kernels.quantize import Encoded, Quantizer
from kernels.stores.base import (
    Shape,
    Side,
    Visual,
    check_geometry,
    nbytes,
    positions,
    settled,
    take,
    within,
    write,
)


class Packed(struct.PyTreeNode):
    """Codes of `bits` bits, in one or two planes of words (see `words`).

    Keys lie token by token, w = words(d) a token, so that an append writes one row: planes (b, h, s, w). Values lie
    channel by channel, w = words(s): planes (b, h, d, w). Spans and zeros are (b, h, s / group, d) for groups along
    tokens, (b, h, d / group, s) along channels. `recent` is a ring: position p lies in slot p mod its size.
    """

    codes: tuple[UInt16[Array, "b h n w"], ...]
    span: Float[Array, "b h m n"]
    zero: Float[Array, "b h m n"]
    recent: Float[Array, "b h r d"]
    bits: int = struct.field(pytree_node=False)
    side: Side = struct.field(pytree_node=False)
    quantizer: Quantizer = struct.field(pytree_node=False)
    window: int = struct.field(pytree_node=False)
    capacity: int = struct.field(pytree_node=False)

    @classmethod
    def empty(
        cls, shape: Shape, bits: int, side: Side, quantizer: Quantizer, window: int, dtype: DTypeLike
    ) -> "Packed":
        if bits not in quantize.PACKED_BITS:
            raise ValueError(f"bits: got {bits}, expected one of {quantize.PACKED_BITS} (16 is Dense)")
        check_geometry(shape, quantizer, window)
        b, h, s, d = shape
        outer, packed = (s, d) if side == "keys" else (d, s)
        along_tokens = quantizer.axis == "tokens"
        meta = (b, h, s // quantizer.group, d) if along_tokens else (b, h, d // quantizer.group, s)
        kind = DTYPES[quantizer.metadata]
        return cls(
            codes=tuple(
                jnp.zeros((b, h, outer, words.count(packed, width)), jnp.uint16) for width in words.PLANES[bits]
            ),
            # Two calls: a donated buffer must not appear twice.
            span=jnp.zeros(meta, kind),
            zero=jnp.zeros(meta, kind),
            recent=jnp.zeros((b, h, window + (quantizer.group if along_tokens else 0), d), dtype),
            bits=bits,
            side=side,
            quantizer=quantizer,
            window=window,
            capacity=s,
        )

    @property
    def run(self) -> int:
        """The run of words in a plane of values."""
        return words.run_of(self.capacity, self.bits)

    @property
    def exact(self) -> bool:
        return False

    @property
    def dtype(self) -> DTypeLike:
        return self.recent.dtype

    @property
    def sizes(self) -> dict[str, int]:
        return {"codes": nbytes(*self.codes), "scales": nbytes(self.span, self.zero), "exact": nbytes(self.recent)}

    def append(
        self, new: Float[Array, "b h t d"], starts: Int[Array, "b"], counts: Int[Array, "b"], visual: Visual = None
    ) -> "Packed":
        t, step, new = new.shape[2], self.quantizer.step, new.astype(self.dtype)
        counts = jnp.minimum(counts, self.capacity - starts)
        first = self.settled(starts)
        flushed = self.settled(starts + counts) - first
        length = -(-t // step) * step
        block = self._gather(new, first[:, None] + jnp.arange(length), starts)
        encoded = quantize.encode(self.quantizer.split(block.astype(jnp.float32)), self.bits, self.quantizer)
        at = positions(first, flushed, length, self.capacity)
        groups_at = positions(first // step, flushed // step, length // step, self.capacity // step)
        return self.replace(
            codes=self._write_codes(encoded.codes.reshape(block.shape), at),
            span=self._write_meta(self.span, encoded.span, groups_at),
            zero=self._write_meta(self.zero, encoded.zero, groups_at),
            recent=self._slide(new, starts, counts),
        )

    def read(self, lengths: Int[Array, "b"], visual: Visual = None) -> Float[Array, "b h s d"]:
        settled = (jnp.arange(self.capacity) < self.settled(lengths)[:, None])[:, None, :, None]
        stored = self._decoded()
        if self.recent.shape[2]:
            slots = jnp.arange(self.capacity) % self.recent.shape[2]
            stored = jnp.where(settled, stored, jnp.take(self.recent, slots, axis=2).astype(jnp.float32))
        return jnp.where(within(lengths, self.capacity), stored, 0)

    def rounded(self, ages: Int[Array, "b t"], visual: Visual = None) -> Bool[Array, "b t s"]:
        return jnp.arange(self.capacity) < self.settled(ages)[..., None]

    def settled(self, lengths: Int[Array, "*b"]) -> Int[Array, "*b"]:
        """Returns how many of the first tokens lie in codes in a row of this length."""
        return settled(lengths, self.quantizer, self.window)

    def decoded_at(self, at: Int[Array, "b n"]) -> Float[Array, "b h n d"]:
        """Returns what the codes of a few positions stand for."""
        planes = zip(self.codes, words.PLANES[self.bits], strict=True)
        if self.side == "keys":
            d = self.recent.shape[3]
            parts = (words.unpack(take(plane, at), width, plane.shape[3], d) for plane, width in planes)
        else:
            parts = (words.get(plane, at, width, self.run).transpose(0, 1, 3, 2) for plane, width in planes)
        codes = words.join(tuple(parts), self.bits).astype(jnp.float32)
        encoded = Encoded(codes, *(self._meta_at(meta, at) for meta in (self.span, self.zero)))
        return quantize.decode(encoded, self.bits, self.quantizer)

    def recent_at(self, at: Int[Array, "b n"]) -> Float[Array, "b h n d"]:
        """Returns the ring's tokens at positions that it still holds."""
        return take(self.recent, at % self.recent.shape[2])

    def crop(self, lengths: Int[Array, "b"], kept: Int[Array, "b"], visual: Visual = None) -> "Packed":
        """Returns the store with only the first tokens: exact again where the ring still has them, else rounded.

        The codes of what is forgotten stay where they are, to be written over.
        """
        size = self.recent.shape[2]
        if not size:
            return self
        position = _ring_positions(kept, size)
        lost = position < (lengths - size)[:, None]
        rounded = take(self.read(lengths), jnp.maximum(position, 0)).astype(self.dtype)
        return self.replace(recent=jnp.where(lost[:, None, :, None], rounded, self.recent))

    def _write_codes(self, codes: Float[Array, "b h n d"], at: Int[Array, "b n"]) -> tuple[Array, ...]:
        parts = words.split(codes.astype(jnp.uint16), self.bits)
        planes = zip(self.codes, parts, words.PLANES[self.bits], strict=True)
        if self.side == "keys":
            return tuple(write(plane, words.pack(part, width, plane.shape[3]), at) for plane, part, width in planes)
        return tuple(
            words.put(plane, part.transpose(0, 1, 3, 2), at, width, self.run, self.capacity)
            for plane, part, width in planes
        )

    def _decoded(self) -> Float[Array, "b h s d"]:
        """Returns what all codes stand for."""
        planes = tuple(zip(self.codes, words.PLANES[self.bits], strict=True))
        if self.side == "keys":
            parts = (words.unpack(plane, width, plane.shape[3], self.recent.shape[3]) for plane, width in planes)
            codes = words.join(tuple(parts), self.bits)
        else:
            parts = (words.unpack(plane, width, self.run, self.capacity) for plane, width in planes)
            codes = words.join(tuple(parts), self.bits).transpose(0, 1, 3, 2)
        grouped = self.quantizer.split(codes.astype(jnp.float32))
        encoded = Encoded(grouped, self._per_group(self.span), self._per_group(self.zero))
        return quantize.decode(encoded, self.bits, self.quantizer).reshape(codes.shape)

    def _per_group(self, meta: Array) -> Array:
        """Returns spans or zeros as `Encoded` holds them."""
        if self.quantizer.axis == "tokens":
            return jnp.expand_dims(meta, -2)
        return jnp.expand_dims(meta.transpose(0, 1, 3, 2), -1)

    def _meta_at(self, meta: Array, at: Int[Array, "b n"]) -> Array:
        """Returns every channel's span or zero at these positions."""
        if self.quantizer.axis == "tokens":
            return take(meta, at // self.quantizer.group)
        picked = jax.vmap(lambda row, i: jnp.take(row, i, axis=-1, mode="clip"))(meta, at)
        return jnp.repeat(picked.transpose(0, 1, 3, 2), self.quantizer.group, axis=-1)

    def _write_meta(self, meta: Array, new: Array, at: Int[Array, "b n"]) -> Array:
        """Returns spans or zeros with those of some groups (tokens) written."""
        if self.quantizer.axis == "tokens":
            return write(meta, jnp.squeeze(new, -2), at)
        fresh = jnp.squeeze(new, -1).transpose(0, 1, 3, 2)
        return jax.vmap(lambda row, x, i: row.at[:, :, i].set(x, mode="drop"))(meta, fresh, at)

    def _gather(self, new: Array, at: Int[Array, "b n"], starts: Int[Array, "b"]) -> Array:
        """Returns the tokens at these positions: from the ring before `starts`, else from the new ones."""
        fresh = take(new, jnp.clip(at - starts[:, None], 0, new.shape[2] - 1))
        if not self.recent.shape[2]:
            return fresh
        old = self.recent_at(at)
        return jnp.where((at < starts[:, None])[:, None, :, None], old, fresh)

    def _slide(self, new: Array, starts: Int[Array, "b"], counts: Int[Array, "b"]) -> Array:
        """Returns the ring after the append: each slot holds its latest position."""
        position = _ring_positions(starts + counts, self.recent.shape[2])
        fresh = take(new, jnp.clip(position - starts[:, None], 0, new.shape[2] - 1))
        is_new = (position >= starts[:, None])[:, None, :, None]
        return jnp.where(is_new, fresh, self.recent)


def _ring_positions(lengths: Int[Array, "b"], size: int) -> Int[Array, "b r"]:
    """Returns the latest position that each slot of a ring holds in a row of this length; negative if none yet."""
    last = lengths[:, None] - 1
    return last - (last - jnp.arange(size)) % max(size, 1)
