"""What attention over a cache means, in float32, readable as its formula."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels.rope import Rotation, rotate
from kernels.stores import Store, exact_view
from kernels.stores.base import Visual


class Append(NamedTuple):
    """The append that brought the queries' own tokens: keys and values unrounded, and the stores before it."""

    k: Float[Array, "b k t d"]
    v: Float[Array, "b k t d"]
    keys: Store
    values: Store


class Rows(NamedTuple):
    """How far each row has come: tokens stored now, the position of its first query, and which hold image tokens."""

    lengths: Int[Array, "b"]
    starts: Int[Array, "b"]
    visual: Visual = None


class Call(NamedTuple):
    """What every backend is given: the arguments of `kernels.attend.attend`, checked and complete."""

    q: Float[Array, "b h t d"]
    keys: Store
    values: Store
    rows: Rows
    append: Append | None
    turn: Rotation | None
    round_own: bool
    scale: float


def attend(call: Call) -> Float[Array, "b h t d"]:
    """Returns softmax(q K^T * scale) V over the tokens that each query may see.

    Query i of row b stands at position starts[b] + i and sees the positions up to its own, each exact or
    rounded just as it was when the row was that long (`round_own`), or as before this append. A single query
    finds both in the store; several, which settle tokens behind one another, take the exact ones from `append`.
    Keys kept before RoPE take their `turn`, that of all positions, after they were read.
    """
    q, keys, values, rows, append, turn, round_own, scale = call

    def turned(k: Float[Array, "b k s d"]) -> Float[Array, "b k s d"]:
        return k if turn is None else rotate(k, turn)

    rounded_k, rounded_v = turned(keys.read(rows.lengths, rows.visual)), values.read(rows.lengths, rows.visual)
    at = rows.starts[:, None] + jnp.arange(q.shape[2])
    causal = jnp.arange(rounded_k.shape[2]) <= at[:, :, None]
    if q.shape[2] == 1 or append is None or (keys.exact and values.exact):
        return _mix(_weights(_scores(q, rounded_k, scale), causal), rounded_v).astype(q.dtype)
    exact_k = turned(exact_view(append.keys, append.k, rows.starts, rows.visual))
    exact_v = exact_view(append.values, append.v, rows.starts, rows.visual)
    ages = at + 1 if round_own else jnp.broadcast_to(rows.starts[:, None], at.shape)
    k_rounded, v_rounded = (store.rounded(ages, rows.visual)[:, None, None] for store in (keys, values))
    scores = jnp.where(k_rounded, _scores(q, rounded_k, scale), _scores(q, exact_k, scale))
    weights = _weights(scores, causal)
    mixed = _mix(jnp.where(v_rounded, weights, 0), rounded_v) + _mix(jnp.where(v_rounded, 0, weights), exact_v)
    return mixed.astype(q.dtype)


def _scores(q: Float[Array, "b h t d"], k: Float[Array, "b k s d"], scale: float) -> Float[Array, "b k r t s"]:
    """Returns scaled scores with the h query heads as k groups of r."""
    b, h, t, d = q.shape
    grouped = q.astype(jnp.float32).reshape(b, k.shape[1], h // k.shape[1], t, d)
    return jnp.einsum("bkrtd,bksd->bkrts", grouped, k) * scale


def _weights(scores: Float[Array, "b k r t s"], causal: Bool[Array, "b t s"]) -> Float[Array, "b k r t s"]:
    return jax.nn.softmax(jnp.where(causal[:, None, None], scores, -jnp.inf), axis=-1)


def _mix(weights: Float[Array, "b k r t s"], v: Float[Array, "b k s d"]) -> Float[Array, "b h t d"]:
    mixed = jnp.einsum("bkrts,bksd->bkrtd", weights, v)
    return mixed.reshape(mixed.shape[0], -1, *mixed.shape[3:])
