"""An append to a packed store in one launch: new tokens to the ring, settled ones to words in place.

Of keys, a program takes a row's and head's group of tokens, which are rows of words that no other program writes. Of
values, it takes a few words of each run in a block of words, and so all tokens of these words: one run after the other.

Nor do programs race for the ring. Program 0 of a row and head alone writes it, and
- with one new token it is the only one: it reads what settles, waits for all its threads, and then writes one slot,
  which in a ring of values is the slot of the token that settles;
- with more, others read the ring too. So the new ring is another buffer (it is small) and nobody writes the old one.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int

from kernels import words
from kernels.gpu.settled import stored_bits
from kernels.gpu.triton.rounding import Rounding
from kernels.gpu.triton.shapes import power
from kernels.stores import Packed

LANES = 16
"""The most words of a run, and slots of the ring, that are taken at once."""
LARGEST = 1 << 14
"""The most elements of a tile: with 8 warps these are still held in registers, as compiled for sm_90a and sm_80."""
_WARP = 512  # elements of a tile


class Row(NamedTuple):
    """Positions of a row: new tokens go to `start` and on, before `stop`; those from `first`, before `last`, settle."""

    start: Int[Array, ""]
    stop: Int[Array, ""]
    first: Int[Array, ""]
    last: Int[Array, ""]


class Place(NamedTuple):
    """Where a run's tokens go: the run's number, words of its block, which tokens are real, and if no run follows."""

    run: Int[Array, ""]
    lane: Int[Array, "n"]
    real: Bool[Array, "n 1"]
    is_last: Bool[Array, ""]


class Gathered(NamedTuple):
    """Fields of words that are not written yet, and a mask of where they lie, the same for all channels."""

    word: Int[Array, "n d"]
    mask: Int[Array, "n 1"]


Held = Callable[[Int[Array, "n"]], Float[Array, "n d"]]
"""Gives the tokens at positions, as a ring holds them."""


def unsupported(store: Packed, t: int) -> str | None:
    """Returns why t tokens cannot be appended to a store by this kernel, or None."""
    quantizer, d = store.quantizer, store.recent.shape[3]
    if t < 1:
        return f"{t} tokens are new"
    if quantizer.codebook != "uniform":
        return "its codes are of a codebook, not of even levels"
    if quantizer.axis != ("tokens" if store.side == "keys" else "channels"):
        return f"its {store.side} are grouped along {quantizer.axis}"
    if power(d) != d or power(quantizer.group) != quantizer.group:
        return f"head_dim {d} and group {quantizer.group} are not both powers of two"
    if store.side == "keys" and d < words.fields(min(words.PLANES[store.bits])):
        return f"its head_dim of {d} does not fill a word"
    size = Program.of(store, t, True).tile * d
    return f"a tile of {size} elements is more than {LARGEST}" if size > LARGEST else None


@functools.partial(jax.jit, static_argnames="interpret")  # layers alike are traced and lowered once
def append(
    store: Packed,
    new: Float[Array, "b h t d"],
    starts: Int[Array, "b"],
    counts: Int[Array, "b"],
    *,
    interpret: bool = False,
) -> Packed:
    """Returns what `Packed.append` does, written over the store's own buffers if it is donated.

    Two things hang on the order in which a group is reduced: which of two shares clips it, where their squared errors
    differ by the rounding of sums; and the sign of a zero that is the least of a group with zeros of both signs.

    Raises:
        ValueError: the store is `unsupported`.
    """
    b, h, t, d = new.shape
    if reason := unsupported(store, t):
        raise ValueError(f"store: {reason}; use its own `append`")
    program = Program.of(store, t, interpret)
    codes, ring = [*store.codes, stored_bits(store.span), stored_bits(store.zero)], [store.recent] * program.has_ring
    inputs = [starts.astype(jnp.int32), counts.astype(jnp.int32), new, *ring, *codes]
    aliases = {3 + len(ring) + i: i for i in range(len(codes))} | ({3: len(codes)} if ring and t == 1 else {})
    call = pl.pallas_call(
        program,
        grid=(h, program.programs, b),
        in_specs=[pl.BlockSpec((1,), lambda head, number, row: (row,))] * 2 + [_whole(x) for x in inputs[2:]],
        out_specs=[_whole(x) for x in codes + ring],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in codes + ring],
        input_output_aliases=aliases,
        compiler_params=plgpu.CompilerParams(num_warps=max(min(program.tile * d // _WARP, 8), 1), num_stages=1),
        interpret=interpret,
        name=f"append_{store.side}{store.bits}",
    )
    *planes, span, zero, recent = [*call(*inputs), store.recent][: len(codes) + 1]
    span, zero = (jax.lax.bitcast_convert_type(x, store.span.dtype) for x in (span, zero))
    return store.replace(codes=tuple(planes), span=span, zero=zero, recent=recent)


@dataclasses.dataclass(frozen=True)
class Program:
    """What is known when the kernel is compiled; of the store, shapes."""

    store: Packed
    t: int
    interpret: bool

    @classmethod
    def of(cls, store: Packed, t: int, interpret: bool) -> "Program":
        return cls(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), store), t, interpret)

    def __call__(self, start_ref: Any, count_ref: Any, new_ref: Any, *refs: Any) -> None:
        store, start, number = self.store, start_ref[0], pl.program_id(1)
        inputs, outputs = refs[: len(refs) // 2], refs[len(refs) // 2 :]
        stop = jnp.minimum(start + count_ref[0], store.capacity)
        row = Row(start, stop, store.settled(start), store.settled(stop))
        held = functools.partial(self._held, row, new_ref, inputs[0] if self.has_ring else None)
        write = self._keys if store.side == "keys" else self._values
        write(row, number, held, outputs[: len(store.codes) + 2])
        if self.has_ring:
            self._slide(row, number, held, outputs[-1])

    @property
    def rounding(self) -> Rounding:
        quantizer = self.store.quantizer
        return Rounding(self.store.bits, quantizer.metadata, quantizer.clip, self.interpret)

    @property
    def has_ring(self) -> bool:
        return self.store.recent.shape[2] > 0

    @property
    def tile(self) -> int:
        """The tokens of a tile."""
        if self.store.side == "keys":
            return self.store.quantizer.group
        return 1 if self.t == 1 else min(self.store.run, LANES)

    @property
    def runs(self) -> int:
        """The runs of a block of values: of the plane with the most fields."""
        return words.fields(min(words.PLANES[self.store.bits]))

    @property
    def programs(self) -> int:
        """The programs of a row and head."""
        if self.store.side == "keys" or self.t == 1:
            return pl.cdiv(self.t, self.tile)
        return (pl.cdiv(self.t - 1, self.store.run * self.runs) + 1) * (self.store.run // self.tile)

    def _held(self, row: Row, new_ref: Any, ring_ref: Any, at: Int[Array, "n"]) -> Float[Array, "n d"]:
        """Returns tokens at positions: from the ring before the row's start, else of the new ones."""
        fresh, token = (at >= row.start)[:, None], jnp.clip(at - row.start, 0, self.t - 1)
        if ring_ref is None:
            return _load(_rows(new_ref, token), fresh).astype(self.store.dtype)
        old = _load(_rows(ring_ref, at % ring_ref.shape[0]), ~fresh)
        return jnp.where(fresh, _load(_rows(new_ref, token), fresh).astype(old.dtype), old)

    def _slide(self, row: Row, number: Int[Array, ""], held: Held, ref: Any) -> None:
        """Writes the ring: each slot's latest position."""
        size, single = ref.shape[0], self.t == 1
        lane = jnp.arange(1 if single else LANES)

        def write(first: Int[Array, ""]) -> None:
            slot = jnp.minimum(first + lane, size - 1)
            position = row.stop - 1 - (row.stop - 1 - slot) % size
            _store(_rows(ref, slot), held(position), ((position >= row.start) | (not single))[:, None])

        def step(i: Int[Array, ""], nothing: None) -> None:
            write(i * LANES)

        if not single:
            return pl.when(number == 0)(lambda: jax.lax.fori_loop(0, pl.cdiv(size, LANES), step, None))
        if not self.interpret:
            plgpu.debug_barrier()
        return write(row.start % size)

    def _keys(self, row: Row, number: Int[Array, ""], held: Held, refs: Sequence[Any]) -> None:
        """Writes a group of tokens as rows of words."""
        *planes, span_ref, zero_ref = refs
        begin = row.first + number * self.tile

        def write() -> None:
            codes, span, zero = self.rounding.encode(held(begin + jnp.arange(self.tile)).astype(jnp.float32), 0)
            span_ref[begin // self.tile, :], zero_ref[begin // self.tile, :] = span[0], zero[0]
            for ref, part, width in self._planes(planes, codes):
                shifts = (jnp.arange(words.fields(width)) * width)[None, :, None]
                word = jnp.sum(part.reshape(self.tile, words.fields(width), -1) << shifts, axis=1)
                ref[pl.ds(begin, self.tile), :] = word.astype(ref.dtype)

        pl.when(begin < row.last)(write)

    def _values(self, row: Row, number: Int[Array, ""], held: Held, refs: Sequence[Any]) -> None:
        """Writes all tokens of a few words, run by run: fields gather until a word is full or the tokens end."""
        *planes, span_ref, zero_ref = refs
        run, n = self.store.run, self.tile
        block, first = row.first // (run * self.runs), row.first % run
        if self.t > 1:
            block, first = block + number // (run // n), number % (run // n) * n
        low = jnp.maximum(row.first // run, block * self.runs)
        high = jnp.minimum(pl.cdiv(row.last, run), jnp.where(row.last > row.first, block + 1, 0) * self.runs)
        lane = first + jnp.arange(n)

        def step(i: Int[Array, ""], gathered: list[Gathered]) -> list[Gathered]:
            at = i * run + lane
            real = ((row.first <= at) & (at < row.last))[:, None]
            grouped = held(at).astype(jnp.float32).reshape(n, -1, self.store.quantizer.group)
            codes, span, zero = self.rounding.encode(grouped, 2)
            _store(_columns(span_ref, at), span[:, :, 0], real)
            _store(_columns(zero_ref, at), zero[:, :, 0], real)
            place = Place(i, lane, real, i == high - 1)
            parts = zip(self._planes(planes, codes.reshape(n, -1)), gathered, strict=True)
            return [self._gather(*part, place, so_far) for part, so_far in parts]

        nothing = Gathered(*(jnp.zeros((n, wide), jnp.int32) for wide in (self.store.recent.shape[3], 1)))
        jax.lax.fori_loop(low, high, step, [nothing] * len(planes))

    def _gather(self, ref: Any, codes: Int[Array, "n d"], width: int, place: Place, so_far: Gathered) -> Gathered:
        """Returns one plane's words with a run's codes put in; they are written if no field is to follow."""
        fields = words.fields(width)
        field, target = place.run % fields, _columns(ref, place.run // fields * self.store.run + place.lane)
        word, mask = (jnp.where(field == 0, 0, x) for x in so_far)
        word |= jnp.where(place.real, codes << field * width, 0)
        mask |= jnp.where(place.real, ((1 << width) - 1) << field * width, 0)
        changed = (mask != 0) & (place.is_last | (field == fields - 1))
        old = _load(target, changed).astype(jnp.int32)
        _store(target, (old & ~mask | word).astype(ref.dtype), changed)
        return Gathered(word, mask)

    def _planes(self, refs: Sequence[Any], codes: Int[Array, "..."]) -> list[tuple[Any, Int[Array, "..."], int]]:
        """Returns every plane with its bits of the codes and their width."""
        left, found = self.store.bits, []
        for ref, width in zip(refs, words.PLANES[self.store.bits], strict=True):
            left -= width
            found.append((ref, (codes >> left) & (1 << width) - 1, width))
        return found


def _whole(x: Array) -> pl.BlockSpec:
    """Returns the spec of one row's and head's whole array."""
    return pl.BlockSpec((None, None, *x.shape[2:]), lambda head, number, row: (row, head, 0, 0))


def _rows(ref: Any, at: Int[Array, "n"]) -> Any:
    """Returns rows of an array."""
    shape = (at.shape[0], ref.shape[1])
    return ref.at[jnp.broadcast_to(at[:, None], shape), jnp.broadcast_to(jnp.arange(shape[1])[None], shape)]


def _columns(ref: Any, at: Int[Array, "n"]) -> Any:
    """Returns columns of an array, as rows."""
    shape = (at.shape[0], ref.shape[0])
    return ref.at[jnp.broadcast_to(jnp.arange(shape[1])[None], shape), jnp.broadcast_to(at[:, None], shape)]


def _load(view: Any, mask: Bool[Array, "n 1"]) -> Array:
    return plgpu.load(view, mask=jnp.broadcast_to(mask, view.shape), other=0)


def _store(view: Any, x: Array, mask: Bool[Array, "n 1"]) -> None:
    plgpu.store(view, x, mask=jnp.broadcast_to(mask, view.shape))
