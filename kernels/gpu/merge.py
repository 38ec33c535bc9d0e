"""Attention of the parts of a sequence, and their merging by log-sum-exp."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float


class Partials(NamedTuple):
    """What n parts of a sequence give for m query rows of each kv head, scores in log2 units.

    `out` is the sum of p * v, `total` the sum of p, with p = 2^(score - top) and `top` the part's largest score.
    A part without tokens has a `total` of 0.
    """

    out: Float[Array, "b k n m d"]
    top: Float[Array, "b k n m"]
    total: Float[Array, "b k n m"]


def merge(parts: list[Partials]) -> Float[Array, "b k m d"]:
    """Returns the attention over all parts together; 0 for a row that sees nothing.

    Source: FlashDecoding; the sums are those of online softmax, arXiv:1805.02867.
    """
    out, top, total = (jnp.concatenate(field, axis=2) for field in zip(*parts, strict=True))
    weight = jnp.exp2(top - top.max(2, keepdims=True))
    whole = jnp.sum(total * weight, axis=2)
    return jnp.sum(out * weight[..., None], axis=2) / jnp.where(whole == 0, 1, whole)[..., None]
