"""Calls of the attention op for its cases, and what they should give: float64 over what each query alone would see."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels import attend as op
from kernels.cases import Case
from kernels.reference import Append
from kernels.stores.base import take


class Made(NamedTuple):
    """A case's random tokens and queries, in numbers that bfloat16 holds."""

    q: jax.Array
    k: jax.Array
    v: jax.Array


def make(case: Case, seed: int = 0) -> Made:
    rng = np.random.default_rng(seed)
    (h, k, d), b = case.heads, len(case.lengths)

    def draw(*shape: int, scale: Any = 1.0) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape) * scale, jnp.bfloat16)

    # Channels of unlike sizes, as keys have them.
    sizes = 1 + 3 * rng.random(d)
    return Made(draw(b, h, case.t, d), draw(b, k, case.capacity, d, scale=sizes), draw(b, k, case.capacity, d))


def run(case: Case, made: Made, backend: str) -> jax.Array:
    """Returns the op on stores that were filled up to the queries, then with the queries' own tokens."""

    @jax.jit
    def called(made: Made) -> jax.Array:
        lengths, visual = jnp.asarray(case.lengths), case.is_image()
        starts, zero = lengths - case.t, jnp.zeros_like(lengths)
        stores = zip(case.stores(), made[1:], strict=True)
        before = [store.append(x, zero, starts, visual) for store, x in stores]
        new = [take(x, starts[:, None] + jnp.arange(case.t)) for x in made[1:]]
        stores = zip(before, new, strict=True)
        after = [store.append(x, starts, jnp.full_like(starts, case.t), visual) for store, x in stores]
        append = Append(new[0], new[1], before[0], before[1])
        options = {"starts": starts, "visual": visual, "append": append, "backend": backend}
        return op.attend(made.q, after[0], after[1], lengths, **options)

    return called(made)


def expected(case: Case, made: Made) -> np.ndarray:
    """Returns softmax(q K^T / sqrt d) V in float64, each query over the stores as of when its token is the last."""

    @jax.jit
    def read(made: Made, lengths: jax.Array) -> list[jax.Array]:
        visual, zero = case.is_image(), jnp.zeros_like(lengths)
        stores = zip(case.stores(), made[1:], strict=True)
        return [store.append(x, zero, lengths, visual).read(lengths, visual) for store, x in stores]

    out = np.zeros(made.q.shape)
    for i in range(case.t):
        lengths = jnp.asarray(case.lengths) - case.t + i + 1
        keys, values = (np.float64(x) for x in read(made, lengths))
        out[:, :, i] = alone(np.float64(made.q[:, :, i]), keys, values, np.asarray(lengths))
    return out


def alone(q: np.ndarray, keys: np.ndarray, values: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Returns the attention of one query a row, q (b, h, d), over each row's first tokens, in float64."""
    (b, h, d), k = q.shape, keys.shape[1]
    scores = np.einsum("bkrd,bksd->bkrs", q.reshape(b, k, h // k, d), keys) / np.sqrt(d)
    seen = np.arange(keys.shape[2]) < lengths[:, None]
    scores = np.where(seen[:, None, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = np.einsum("bkrs,bksd->bkrd", weights / weights.sum(-1, keepdims=True), values)
    return mixed.reshape(b, h, d)
