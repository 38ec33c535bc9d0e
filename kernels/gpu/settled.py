"""What decode kernels read of a layer's cache: settled tokens as words, and a few exact rows beside them.

A part is a run of tokens that both sides hold as codes. What is not settled on both sides, the window and the unfilled
group, are its latest tokens: a lone query's kernel takes them from where they lie. Sinks, and with several queries all
that is not settled and all that they append, are laid out as rows of float16 with a bias a query: 0 where it sees the
row, `MASKED` where it does not. A token that one query sees rounded and the next one exact has two rows.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from kernels import words
from kernels.reference import Append, Call, Rows
from kernels.stores import Dense, Packed, Split, Store
from kernels.stores.base import take
from kernels.stores.split import Deal

MASKED = -1e30
"""Stands for -inf in scores, so that the difference of two masked ones is no NaN."""


class Codes(NamedTuple):
    """One side's tokens as a kernel reads them.

    bits < 16: `planes` are words (see `words`), keys (b, k, s, w), values (b, k, d, w) in runs of `run`; `span` and
    `zero` are (b, k, s / group, d) for keys, (b, k, d / group, s) for values, as float16 or the bits of float8 (e4m3).
    bits = 16: `planes` is one array (b, k, s, d), of which token i lies at offset + i; no metadata.
    """

    planes: tuple[Array, ...]
    span: Array | None
    zero: Array | None
    bits: int
    group: int = 1
    run: int = 1
    offset: int = 0


class Latest(NamedTuple):
    """A part's tokens behind its settled ones, counts[b] of them.

    Keys lie in a ring, token i in row i mod its size; None: they are exact, and lie where all do. Values lie where all
    do, but for the latest of them, as many as their ring has rows; None: there is no ring.
    """

    counts: Int[Array, "b"]
    keys: Float[Array, "b k r d"] | None
    values: Float[Array, "b k r d"] | None

    @property
    def most(self) -> int:
        """The most that there can be."""
        return max(ring.shape[2] for ring in (self.keys, self.values) if ring is not None)


class Part(NamedTuple):
    """Tokens that every query sees as codes, the first counts[b] of both sides, and those behind them."""

    keys: Codes
    values: Codes
    counts: Int[Array, "b"]
    latest: Latest | None = None

    @property
    def capacity(self) -> int:
        """Tokens that there is memory for on both sides."""
        keys, values = self.keys, self.values
        held = values.planes[0].shape[2] - values.offset if values.span is None else values.span.shape[3]
        return min(held, keys.planes[0].shape[2] - keys.offset)


class Tail(NamedTuple):
    """Rows in float16, and what each query's score of a row is increased by: 0 or `MASKED`."""

    k: Float[Array, "b k n d"]
    v: Float[Array, "b k n d"]
    bias: Float[Array, "b t n"]


class Pair(NamedTuple):
    """One part's stores, its tokens before and after the append and at each query, and what came.

    A dense side may lie in a store with tokens of another part: `offsets` say where the part begins.
    """

    keys: Store
    values: Store
    before: Int[Array, "b"]
    after: Int[Array, "b"]
    ages: Int[Array, "b t"]
    append: Append | None = None
    offsets: tuple[int, int] = (0, 0)


def unreadable(keys: Store, values: Store) -> str | None:
    """Returns why kernels cannot read a layer's stores, or None."""
    for side, store in (("keys", keys), ("values", values)):
        for part in store.parts.values() if isinstance(store, Split) else (store,):
            reason = _unreadable(side, part)
            if reason:
                return f"{side} {reason}"
    return None if _shares(keys) == _shares(values) or _alike(keys, values) else "keys and values keep different parts"


def layout(call: Call) -> tuple[list[Part], Tail | None]:
    """Returns what a call's queries read of a layer: parts in codes, and the rows beside them."""
    t = call.q.shape[2]
    several = t > 1
    parts, tails = [], []
    for name, pair in _pairs(call, t).items():
        base = jnp.zeros_like(pair.after)
        if name != "sinks":
            held = pair.before if several else pair.after
            part = Part(
                _codes(pair.keys, pair.offsets[0]),
                _codes(pair.values, pair.offsets[1]),
                jnp.minimum(_settled(pair.keys, held), _settled(pair.values, held)),
            )
            # A length beyond the capacity is a caller's mistake, but no kernel may read past an array for it.
            base = jnp.minimum(part.counts, part.capacity)
            latest = None if several else _latest(pair, base)
            parts.append(part._replace(counts=base, latest=latest))
            if latest is not None:
                continue
        rest = _rest(pair, t) if name != "sinks" else min(pair.keys.capacity, pair.values.capacity)
        tails += _views(pair, base, rest, t, call.round_own)
    return parts, _joined(tails) if tails else None


def _latest(pair: Pair, base: Int[Array, "b"]) -> Latest | None:
    """Returns a lone query's latest tokens; None if there are none, or keys may be settled before their values are."""
    if not _rest(pair, 1) or not _keys_settle_last(pair.keys, pair.values):
        return None
    rings = (store.recent if isinstance(store, Packed) and store.recent.shape[2] else None for store in pair[:2])
    return Latest(jnp.maximum(pair.after - base, 0), *rings)


def _keys_settle_last(keys: Store, values: Store) -> bool:
    """Returns whether no key is rounded whose value is still exact, though it will be rounded, too."""
    if not isinstance(keys, Packed) or not isinstance(values, Packed):
        return True
    return values.window <= keys.window and keys.quantizer.step % values.quantizer.step == 0


def _shares(store: Store) -> tuple[int, bool]:
    """Returns how many sinks a store has, and whether it keeps image tokens apart."""
    if not isinstance(store, Split):
        return 0, False
    return store.sinks.capacity if store.sinks is not None else 0, store.visual is not None


def _alike(keys: Store, values: Store) -> bool:
    """Returns whether one side is exact, so that it can be read as if it had the other's sinks."""
    dense = any(isinstance(store, Dense) for store in (keys, values))
    return dense and not (_shares(keys)[1] or _shares(values)[1])


def _unreadable(side: str, store: Store) -> str | None:
    if isinstance(store, Dense):
        return None if store.values.dtype.itemsize == 2 else f"are exact in {store.values.dtype}, not in 16 bits"
    if not isinstance(store, Packed):
        return f"lie in a {type(store).__name__} store, not in packed words"
    if store.quantizer.codebook != "uniform":
        return "are codes of a codebook, no numbers"
    if store.quantizer.axis != ("tokens" if side == "keys" else "channels"):
        return f"are grouped along {store.quantizer.axis}"
    if side == "keys" and store.quantizer.group & (store.quantizer.group - 1):
        return f"are in groups of {store.quantizer.group}, no power of two"
    block = words.fields(min(words.PLANES[store.bits])) * store.run
    return f"of a capacity of {store.capacity} fill no whole blocks of words" if store.capacity % block else None


def _pairs(call: Call, t: int) -> dict[str, Pair]:
    """Returns the parts of a layer by name; a side without parts of its own is seen as if it had the other's."""
    _, keys, values, rows, append, *_ = call
    ages = rows.starts[:, None] + 1 + jnp.arange(t)
    split = next((store for store in (keys, values) if isinstance(store, Split)), None)
    if split is None:
        return {"text": Pair(keys, values, rows.starts, rows.lengths, ages, append)}
    deals = split.deals(rows.visual, rows.lengths.shape[0])
    sinks = split.sinks.capacity if split.sinks is not None else 0
    pairs = {}
    for name, deal in deals.items():
        first = sinks if name == "text" else 0
        pairs[name] = Pair(
            keys=_part(keys, name),
            values=_part(values, name),
            before=deal.count(rows.starts),
            after=deal.count(rows.lengths),
            ages=deal.count(ages),
            append=_dealt(append, deal, name, rows),
            offsets=(0 if isinstance(keys, Split) else first, 0 if isinstance(values, Split) else first),
        )
    return pairs


def _part(store: Store, name: str) -> Store:
    return store.parts[name] if isinstance(store, Split) else store


def _dealt(append: Append | None, deal: Deal, name: str, rows: Rows) -> Append | None:
    """Returns an append as one part sees it: its own of the new tokens in front."""
    if append is None:
        return None
    counts = rows.lengths - rows.starts
    k, v = (deal.pick(new, rows.starts, counts)[0] for new in (append.k, append.v))
    return Append(k, v, _part(append.keys, name), _part(append.values, name))


def _settled(store: Store, lengths: Int[Array, "b"]) -> Int[Array, "b"]:
    return store.settled(lengths) if isinstance(store, Packed) else lengths


def _codes(store: Store, offset: int) -> Codes:
    if isinstance(store, Dense):
        return Codes((store.values,), None, None, 16, offset=offset)
    assert isinstance(store, Packed)
    span, zero = (stored_bits(meta) for meta in (store.span, store.zero))
    return Codes(store.codes, span, zero, store.bits, store.quantizer.group, store.run)


def stored_bits(meta: Array) -> Array:
    """Returns float8 as bytes, because GPUs before Ada have no float8; float16 as it is."""
    return meta if meta.dtype == jnp.float16 else jax.lax.bitcast_convert_type(meta, jnp.uint8)


def _rest(pair: Pair, t: int) -> int:
    """Returns how many tokens of a part at most are not settled on both sides."""
    rings = [store.recent.shape[2] for store in pair[:2] if isinstance(store, Packed)]
    return max(rings, default=0) + (t if t > 1 else 0)


def _views(pair: Pair, base: Int[Array, "b"], size: int, t: int, round_own: bool) -> list[Tail]:
    """Returns the rows of a part's tokens from `base` on: one for each state in which some query sees a token."""
    if size == 0:
        return []
    at = base[:, None] + jnp.arange(size)
    seen = at[:, None] < (pair.ages if t > 1 else pair.after[:, None])[:, :, None]
    sides = [_states(pair, i, at, t, round_own) for i in (0, 1)]
    return [Tail(k, v, jnp.where(seen & if_k & if_v, 0, MASKED)) for k, if_k in sides[0] for v, if_v in sides[1]]


def _states(
    pair: Pair, side: int, at: Int[Array, "b n"], t: int, round_own: bool
) -> list[tuple[Float[Array, "b k n d"], Bool[Array, "b #t n"]]]:
    """Returns one side's tokens as queries see them, and which query sees which so."""
    store, always = pair[side], jnp.ones((at.shape[0], 1, at.shape[1]), bool)
    if isinstance(store, Dense):
        return [(narrowed(take(store.values, at + pair.offsets[side])), always)]
    assert isinstance(store, Packed)
    rounded = narrowed(store.decoded_at(at))
    if not store.recent.shape[2] and t == 1:
        return [(rounded, always)]
    if t == 1:
        settled = at < store.settled(pair.after)[:, None]
        return [(jnp.where(settled[:, None, :, None], rounded, narrowed(store.recent_at(at))), always)]
    ages = pair.ages if round_own else jnp.broadcast_to(pair.before[:, None], pair.ages.shape)
    settled = at[:, None] < store.settled(ages)[:, :, None]
    return [(rounded, settled), (narrowed(_exact(pair, side, at)), ~settled)]


def _exact(pair: Pair, side: int, at: Int[Array, "b n"]) -> Float[Array, "b k n d"]:
    """Returns tokens as they were before they were rounded: of the append, or of the ring before it."""
    assert pair.append is not None
    new, old = (pair.append.k, pair.append.keys) if side == 0 else (pair.append.v, pair.append.values)
    assert isinstance(old, Packed)
    fresh = take(new.astype(old.dtype), at - pair.before[:, None])
    if not old.recent.shape[2]:
        return fresh
    return jnp.where((at >= pair.before[:, None])[:, None, :, None], fresh, old.recent_at(at))


def narrowed(x: Float[Array, "*any"], dtype: DTypeLike = jnp.float16) -> Float[Array, "*any"]:
    """Returns numbers in a type; those beyond its largest are that one."""
    limit = float(jnp.finfo(dtype).max)
    return jnp.clip(x.astype(jnp.float32), -limit, limit).astype(dtype)


def _joined(tails: list[Tail]) -> Tail:
    t = max(tail.bias.shape[1] for tail in tails)
    biases = [jnp.broadcast_to(tail.bias, (tail.bias.shape[0], t, tail.bias.shape[2])) for tail in tails]
    k, v = (jnp.concatenate([tail[i] for tail in tails], axis=2) for i in (0, 1))
    return Tail(k, v, jnp.concatenate(biases, axis=2).astype(jnp.float32))
