"""How one side (keys or values) of one layer's KV cache is kept: Dense, Packed or Rounded.

All stores obey one rule, a function of the row's length n alone: the first `settled(n)` tokens are quantized,
in whole blocks of `group` tokens, and at least the latest `window` tokens are exact. So a prefill of n tokens,
n single appends and any mixture leave the same buffers. The bit-width is structure in Packed (deployment: real
bytes) and data in Rounded (search: one program serves every width); both give the same numbers.

Arrays are (b, h, s, d); a batch's rows have lengths of their own and never share a block.
"""

import math
from typing import Protocol, Self

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, DTypeLike, Float, Float16, Int, UInt8

from kernels import quantize
from kernels.quantize import Axis


class Store(Protocol):
    """One side of one layer's cache.

    `append` adds the first counts[b] of the t new tokens to row b, which holds starts[b]; positions that a row
    has not reached stay zero. `read` returns all positions as float32, as the query at the row's last token
    sees them. `exact` says that nothing is ever rounded; `dtype` is that of tokens not rounded yet.
    """

    exact: bool

    @property
    def dtype(self) -> DTypeLike: ...
    @property
    def capacity(self) -> int: ...

    def settled(self, lengths: Int[Array, "*b"]) -> Int[Array, "*b"]: ...
    def append(self, new: Float[Array, "b h t d"], starts: Int[Array, "b"], counts: Int[Array, "b"]) -> Self: ...
    def read(self, lengths: Int[Array, "b"]) -> Float[Array, "b h s d"]: ...


class Dense(struct.PyTreeNode):
    """Every token in the buffer's own dtype."""

    values: Float[Array, "b h s d"]
    exact: bool = struct.field(pytree_node=False, default=True)

    @classmethod
    def empty(cls, shape: tuple[int, int, int, int], dtype: DTypeLike) -> "Dense":
        return cls(jnp.zeros(shape, dtype))

    @property
    def dtype(self) -> DTypeLike:
        return self.values.dtype

    @property
    def capacity(self) -> int:
        return self.values.shape[2]

    def settled(self, lengths: Int[Array, "*b"]) -> Int[Array, "*b"]:
        return lengths

    def append(self, new: Float[Array, "b h t d"], starts: Int[Array, "b"], counts: Int[Array, "b"]) -> "Dense":
        at = _positions(starts, counts, new.shape[2], self.values.shape[2])
        return self.replace(values=_write(self.values, new, at))

    def read(self, lengths: Int[Array, "b"]) -> Float[Array, "b h s d"]:
        return self.values.astype(jnp.float32)


class Rounded(struct.PyTreeNode):
    """Values as Packed would give them back, with the bit-width as data; 16 bits keep them exact."""

    values: Float[Array, "b h s d"]
    bits: Int[Array, ""]
    axis: Axis = struct.field(pytree_node=False)
    group: int = struct.field(pytree_node=False)
    window: int = struct.field(pytree_node=False)
    dtype: DTypeLike = struct.field(pytree_node=False)
    exact: bool = struct.field(pytree_node=False, default=False)

    @classmethod
    def empty(
        cls, shape: tuple[int, int, int, int], bits: Array, axis: Axis, group: int, window: int, dtype: DTypeLike
    ) -> "Rounded":
        _check_geometry(shape, group, window)
        return cls(jnp.zeros(shape, jnp.float32), jnp.asarray(bits, jnp.int32), axis, group, window, dtype)

    @property
    def capacity(self) -> int:
        return self.values.shape[2]

    def settled(self, lengths: Int[Array, "*b"]) -> Int[Array, "*b"]:
        return settled(lengths, self.group, self.window)

    def append(self, new: Float[Array, "b h t d"], starts: Int[Array, "b"], counts: Int[Array, "b"]) -> "Rounded":
        t, capacity = new.shape[2], self.values.shape[2]
        held = new.astype(self.dtype).astype(jnp.float32)
        values = _write(self.values, held, _positions(starts, counts, t, capacity))
        first, flushed = _flush(self.settled, starts, counts)
        length = -(-t // self.group) * self.group
        at = _positions(first, flushed, length, capacity)
        block = _take(values, jnp.minimum(first[:, None] + jnp.arange(length), capacity - 1))
        rounded = quantize.round_groups(block, self.bits, _group_size(self.axis, self.group, new.shape[3]), self.axis)
        return self.replace(values=_write(values, rounded, at))

    def read(self, lengths: Int[Array, "b"]) -> Float[Array, "b h s d"]:
        return self.values


class Packed(struct.PyTreeNode):
    """Codes of `bits` bits packed into bytes, scales and zeros in float16, and the latest tokens exact.

    `recent` is a ring: position p lies in slot p mod (window + group), so a block that settles is contiguous.
    """

    codes: UInt8[Array, "b h s words"]
    scale: Float16[Array, "b h ..."]
    zero: Float16[Array, "b h ..."]
    recent: Float[Array, "b h w d"]
    bits: int = struct.field(pytree_node=False)
    axis: Axis = struct.field(pytree_node=False)
    group: int = struct.field(pytree_node=False)
    window: int = struct.field(pytree_node=False)
    exact: bool = struct.field(pytree_node=False, default=False)

    @classmethod
    def empty(
        cls, shape: tuple[int, int, int, int], bits: int, axis: Axis, group: int, window: int, dtype: DTypeLike
    ) -> "Packed":
        if bits not in quantize.PACKED_BITS:
            raise ValueError(f"bits: got {bits}, expected one of {quantize.PACKED_BITS} (16 is Dense)")
        _check_geometry(shape, group, window)
        b, h, s, d = shape
        if d * bits % 8:
            raise ValueError(f"head_dim: got {d}, expected a multiple of {8 // bits} for {bits} bits")
        meta = (b, h, s // group, d) if axis == "tokens" else (b, h, s, d // _group_size(axis, group, d))
        return cls(
            codes=jnp.zeros((b, h, s, d * bits // 8), jnp.uint8),
            # Two calls: a donated buffer must not appear twice.
            scale=jnp.zeros(meta, jnp.float16),
            zero=jnp.zeros(meta, jnp.float16),
            recent=jnp.zeros((b, h, window + group, d), dtype),
            bits=bits,
            axis=axis,
            group=group,
            window=window,
        )

    @property
    def dtype(self) -> DTypeLike:
        return self.recent.dtype

    @property
    def capacity(self) -> int:
        return self.codes.shape[2]

    def settled(self, lengths: Int[Array, "*b"]) -> Int[Array, "*b"]:
        return settled(lengths, self.group, self.window)

    def append(self, new: Float[Array, "b h t d"], starts: Int[Array, "b"], counts: Int[Array, "b"]) -> "Packed":
        t, group = new.shape[2], self.group
        new = new.astype(self.recent.dtype)
        first, flushed = _flush(self.settled, starts, counts)
        length = -(-t // group) * group
        block = self._gather(new, first[:, None] + jnp.arange(length), starts)
        codes, scale, zero = self._encode(block.astype(jnp.float32))
        at = _positions(first, flushed, length, self.codes.shape[2])
        if self.axis == "tokens":
            meta_at = _positions(first // group, flushed // group, length // group, self.scale.shape[2])
        else:
            meta_at = at
        return self.replace(
            codes=_write(self.codes, codes, at),
            scale=_write(self.scale, scale, meta_at),
            zero=_write(self.zero, zero, meta_at),
            recent=self._slide(new, starts, counts),
        )

    def read(self, lengths: Int[Array, "b"]) -> Float[Array, "b h s d"]:
        b, h, s, _ = self.codes.shape
        codes = quantize.unpack(self.codes, self.bits).astype(jnp.float32)
        grouped = quantize.split_groups(codes, _group_size(self.axis, self.group, codes.shape[3]), self.axis)
        member = quantize.group_axis(self.axis)
        scale, zero = jnp.expand_dims(self.scale, member), jnp.expand_dims(self.zero, member)
        settled = quantize.decode(quantize.Encoded(grouped, scale, zero)).reshape(b, h, s, -1)
        position = jnp.arange(s)
        recent = jnp.take(self.recent, position % self.recent.shape[2], axis=2).astype(jnp.float32)
        is_settled = (position < self.settled(lengths)[:, None])[:, None, :, None]
        is_stored = (position < lengths[:, None])[:, None, :, None]
        return jnp.where(is_settled, settled, jnp.where(is_stored, recent, 0))

    def _encode(self, block: Float[Array, "b h n d"]) -> tuple[Array, Array, Array]:
        """Returns packed codes, scale and zero of whole blocks, laid out as the buffers are."""
        grouped = quantize.split_groups(block, _group_size(self.axis, self.group, block.shape[3]), self.axis)
        codes, scale, zero = quantize.encode(grouped, self.bits, self.axis)
        member = quantize.group_axis(self.axis)
        packed = quantize.pack(codes.reshape(block.shape), self.bits)
        return packed, jnp.squeeze(scale, member), jnp.squeeze(zero, member)

    def _gather(self, new: Array, at: Int[Array, "b n"], starts: Int[Array, "b"]) -> Array:
        """Returns the tokens at these positions: from the ring before `starts`, else from the new ones."""
        old = _take(self.recent, at % self.recent.shape[2])
        fresh = _take(new, jnp.clip(at - starts[:, None], 0, new.shape[2] - 1))
        return jnp.where((at < starts[:, None])[:, None, :, None], old, fresh)

    def _slide(self, new: Array, starts: Int[Array, "b"], counts: Int[Array, "b"]) -> Array:
        """Returns the ring after the append: each slot holds its latest position."""
        size = self.recent.shape[2]
        slot = jnp.arange(size)
        last = (starts + counts)[:, None] - 1
        position = last - (last - slot) % size
        fresh = _take(new, jnp.clip(position - starts[:, None], 0, new.shape[2] - 1))
        is_new = (position >= starts[:, None])[:, None, :, None]
        return jnp.where(is_new, fresh, self.recent)


def exact_view(store: Store, new: Float[Array, "b h t d"], starts: Int[Array, "b"]) -> Float[Array, "b h s d"]:
    """Returns what a store holds, with t more tokens in place after `starts` and nothing newly rounded."""
    stored = store.read(starts)
    step = jnp.arange(stored.shape[2]) - starts[:, None]
    is_new = ((step >= 0) & (step < new.shape[2]))[:, None, :, None]
    return jnp.where(is_new, _take(new.astype(store.dtype).astype(jnp.float32), step), stored)


def settled(lengths: Int[Array, "*b"], group: int, window: int) -> Int[Array, "*b"]:
    """Returns how many of the first tokens are quantized in a row of this length."""
    return jnp.maximum(lengths - window, 0) // group * group


def _flush(settled_of, starts: Int[Array, "b"], counts: Int[Array, "b"]) -> tuple[Array, Array]:
    """Returns the first position that an append settles, and how many it settles."""
    first = settled_of(starts)
    return first, settled_of(starts + counts) - first


def _group_size(axis: Axis, group: int, dim: int) -> int:
    """Returns the group along `axis`: channels that `group` does not divide use their common divisor."""
    return group if axis == "tokens" else math.gcd(group, dim)


def _positions(starts: Array, counts: Array, t: int, capacity: int) -> Int[Array, "b t"]:
    """Returns where t tokens go, with an index past the end (dropped by `_write`) beyond a row's count."""
    step = jnp.arange(t)
    return jnp.where(step < counts[:, None], starts[:, None] + step, capacity)


def _write(buffer: Array, new: Array, at: Int[Array, "b t"]) -> Array:
    """Returns the buffer with row b's token t written at position at[b, t]; out of range is dropped."""
    return jax.vmap(lambda row, x, i: row.at[:, i].set(x.astype(row.dtype), mode="drop"))(buffer, new, at)


def _take(buffer: Array, at: Int[Array, "b t"]) -> Array:
    """Returns row b's tokens at positions at[b]."""
    return jax.vmap(lambda row, i: jnp.take(row, i, axis=1, mode="clip"))(buffer, at)


def _check_geometry(shape: tuple[int, int, int, int], group: int, window: int) -> None:
    if group < 1 or window < 0 or window % group or shape[2] % group:
        raise ValueError(
            f"group, window, capacity: got {group}, {window}, {shape[2]}; expected a window and a capacity that are"
            " multiples of the group"
        )
