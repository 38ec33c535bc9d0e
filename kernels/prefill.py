"""Attention of a prompt's many tokens by `jax.nn.dot_product_attention`: cuDNN's flash attention, or plain XLA.

A query sees each token's key rounded or exact, and its value likewise (`kernels.reference`). Each pair of states that
some query may meet is a *segment*: all tokens once more, their keys and values in these states. Segments lie end to
end, and a mask shows a query each token in one of them, so that all is one softmax.

Exact stores are one segment, and so is a first prompt that does not see itself rounded (`round_own`); quantized ones
are 2 without a window and 3 with one. The first prompt of all rows reads its own t tokens and not the whole capacity;
of one segment it is plain causal attention without a mask, of which cuDNN skips the half that is hidden.

Memory, s being t or the capacity: the mask has b * t * segments * s bools, and cuDNN is given it as a bias of 2 bytes
each; all heads share it. Scores, (b, h, t, segments * s) in float32, are held as a whole by XLA and never by cuDNN.
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from kernels.gpu import device
from kernels.gpu.decode import QUERIES
from kernels.gpu.settled import narrowed
from kernels.reference import Call
from kernels.rope import Rotation, rotate
from kernels.stores import Dense, Packed, Rounded, Split, Store, exact_view

Implementation = Literal["cudnn", "xla"]


class Side(NamedTuple):
    """Keys or values: the store, what came unrounded and to which store, and the rotation that keys still lack."""

    store: Store
    came: tuple[Float[Array, "b k t d"], Store] | None
    turn: Rotation | None = None


class State(NamedTuple):
    """One side's tokens all rounded or all exact, and which query sees which of them so; None: every query all."""

    rounded: bool
    tokens: Float[Array, "b k s d"]
    shown: Bool[Array, "b t s"] | None = None


def cudnn_unsupported(call: Call) -> str | None:
    """Returns why cuDNN cannot compute a call, or None. JAX itself says which types and shapes cuDNN takes."""
    if (reason := device.lacking() or xla_unsupported(call)) is not None:
        return reason
    b, h, t, d = call.q.shape
    q = jax.ShapeDtypeStruct((b, t, h, d), _dtype(call, "cudnn"))
    try:
        jax.eval_shape(functools.partial(jax.nn.dot_product_attention, implementation="cudnn"), q, q, q)
    except (NotImplementedError, RuntimeError, ValueError) as error:
        return str(error)
    return None


def xla_unsupported(call: Call) -> str | None:
    """Returns why a call is no prompt's, or None."""
    t, capacity = call.q.shape[2], call.keys.capacity
    if t <= QUERIES:
        return f"it takes more than {QUERIES} queries a row, got {t}"
    return f"{t} new tokens a row are more than a cache of {capacity} holds" if t > capacity else None


def with_cudnn(call: Call) -> Float[Array, "b h t d"]:
    """Returns the attention by cuDNN. Source: FlashAttention, arXiv:2205.14135."""
    return _attend(call, "cudnn")


def with_xla(call: Call) -> Float[Array, "b h t d"]:
    """Returns the attention by XLA."""
    return _attend(call, "xla")


def _attend(call: Call, implementation: Implementation) -> Float[Array, "b h t d"]:
    # Only the device knows: one program serves a first prompt and the turns after it.
    first, t = jnp.all(call.rows.starts == 0), call.q.shape[2]
    return jax.lax.cond(first, lambda: _over(call, t, implementation), lambda: _over(call, None, implementation))


def _over(call: Call, size: int | None, implementation: Implementation) -> Float[Array, "b h t d"]:
    """Returns the attention over the cache; `size`: over the new tokens, so many a row, if there were none before."""
    append = call.append
    keys = _states(call, Side(call.keys, append and (append.k, append.keys), call.turn), size)
    values = _states(call, Side(call.values, append and (append.v, append.values)), size)
    ordered = _values_settle_first(call.keys, call.values)
    segments = [(k, v) for k in keys for v in values if v.rounded or not k.rounded or not ordered]
    k, v = (jnp.concatenate([segment[side].tokens for segment in segments], axis=2) for side in (0, 1))
    q, k, v = (narrowed(x, _dtype(call, implementation)).transpose(0, 2, 1, 3) for x in (call.q, k, v))
    plain = size is not None and len(segments) == 1
    mask = None if plain else _mask(call, segments)
    out = jax.nn.dot_product_attention(
        q, k, v, mask=mask, is_causal=plain, scale=call.scale, implementation=implementation
    )
    return out.transpose(0, 2, 1, 3).astype(call.q.dtype)


def _states(call: Call, side: Side, size: int | None) -> list[State]:
    """Returns one side's tokens in each state in which some query may see some of them."""
    if side.store.exact or (size is not None and not call.round_own):
        return [State(False, _tokens(call, side, False, size))]
    if call.round_own and _settles_at_once(side.store):
        return [State(True, _tokens(call, side, True, size))]
    at = _positions(call)
    ages = at + 1 if call.round_own else jnp.broadcast_to(call.rows.starts[:, None], at.shape)
    shown = side.store.rounded(ages, call.rows.visual)[:, :, :size]
    return [State(kind, _tokens(call, side, kind, size), shown == kind) for kind in (True, False)]


def _tokens(call: Call, side: Side, rounded: bool, size: int | None) -> Float[Array, "b k s d"]:
    """Returns one side's tokens in one state, as queries meet them."""
    rows, store = call.rows, side.store
    if rounded or side.came is None or (store.exact and size is None):
        tokens = store.read(rows.lengths, rows.visual)[:, :, :size]
    elif size is None:
        new, before = side.came
        tokens = exact_view(before, new, rows.starts, rows.visual)
    else:
        tokens = side.came[0].astype(store.dtype).astype(jnp.float32)
    if side.turn is None:
        return tokens
    cos, sin = side.turn
    return rotate(tokens, (cos[:, :, :size], sin[:, :, :size]))


def _mask(call: Call, segments: list[tuple[State, State]]) -> Bool[Array, "b 1 t n"]:
    """Returns which tokens of which segment each query sees."""
    seen = jnp.arange(segments[0][0].tokens.shape[2]) <= _positions(call)[:, :, None]
    shown = ([state.shown for state in segment if state.shown is not None] for segment in segments)
    return jnp.concatenate([functools.reduce(jnp.logical_and, both, seen) for both in shown], axis=2)[:, None]


def _positions(call: Call) -> Int[Array, "b t"]:
    return call.rows.starts[:, None] + jnp.arange(call.q.shape[2])


def _settles_at_once(store: Store) -> bool:
    """Returns whether every query sees all tokens of a quantized store rounded, its own among them."""
    return isinstance(store, Packed | Rounded) and not store.window and store.quantizer.step == 1


def _values_settle_first(keys: Store, values: Store) -> bool:
    """Returns whether no token's value is exact any more once its key is rounded."""
    if isinstance(keys, Split) and isinstance(values, Split):
        sinks = [store.sinks.capacity if store.sinks else 0 for store in (keys, values)]
        if keys.parts.keys() != values.parts.keys() or sinks[0] != sinks[1]:
            return False
        return all(_values_settle_first(keys.parts[name], values.parts[name]) for name in keys.parts)
    if not isinstance(keys, Packed | Rounded) or not isinstance(values, Packed | Rounded):
        return isinstance(keys, Dense)
    return values.window <= keys.window and keys.quantizer.step % values.quantizer.step == 0


def _dtype(call: Call, implementation: Implementation) -> DTypeLike:
    """Returns the type of the products' factors: for cuDNN float16, which keeps three bits more than bfloat16."""
    return jnp.float16 if implementation == "cudnn" and call.q.dtype.itemsize == 2 else jnp.float32
