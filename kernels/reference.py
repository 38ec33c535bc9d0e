"""What attention over a cache means, in float32, readable as its formula."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels.stores import Store, exact_view


class Append(NamedTuple):
    """The append that brought the queries' own tokens: keys and values unrounded, and the stores before it."""

    k: Float[Array, "b k t d"]
    v: Float[Array, "b k t d"]
    keys: Store
    values: Store


def attend(
    q: Float[Array, "b h t d"],
    keys: Store,
    values: Store,
    lengths: Int[Array, "b"],
    starts: Int[Array, "b"],
    append: Append | None,
    round_own: bool,
    scale: float,
) -> Float[Array, "b h t d"]:
    """Returns softmax(q K^T * scale) V over the tokens that each query may see.

    Query i of row b stands at position starts[b] + i and sees the positions up to its own, each exact or
    rounded just as it was when the row was that long (`round_own`), or as before this append. A single query
    finds both in the store; several, which settle blocks behind one another, take the exact ones from `append`.
    """
    rounded_k, rounded_v = keys.read(lengths), values.read(lengths)
    at = starts[:, None] + jnp.arange(q.shape[2])
    causal = jnp.arange(rounded_k.shape[2]) <= at[:, :, None]
    if q.shape[2] == 1 or append is None or (keys.exact and values.exact):
        return _mix(_weights(_scores(q, rounded_k, scale), causal), rounded_v).astype(q.dtype)
    exact_k = exact_view(append.keys, append.k, starts)
    exact_v = exact_view(append.values, append.v, starts)
    ages = at + 1 if round_own else jnp.broadcast_to(starts[:, None], at.shape)
    k_settled, v_settled = (_seen_settled(store, ages, rounded_k.shape[2]) for store in (keys, values))
    scores = jnp.where(k_settled, _scores(q, rounded_k, scale), _scores(q, exact_k, scale))
    weights = _weights(scores, causal)
    mixed = _mix(jnp.where(v_settled, weights, 0), rounded_v) + _mix(jnp.where(v_settled, 0, weights), exact_v)
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


def _seen_settled(store: Store, ages: Int[Array, "b t"], capacity: int) -> Bool[Array, "b 1 1 t s"]:
    """Returns whether a query made when the row was `ages` long sees a position in its rounded form."""
    return (jnp.arange(capacity) < store.settled(ages)[:, :, None])[:, None, None]
