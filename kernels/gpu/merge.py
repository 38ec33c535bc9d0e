"""Attention of the parts of a sequence, and their merging by log-sum-exp."""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

FEW = 4
"""The most parts that are taken one by one."""


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
    parts = [single for part in parts for single in _singles(part)]
    top = functools.reduce(jnp.maximum, [part.top.max(2, keepdims=True) for part in parts])
    # Part by part, not concatenated: that would be three launches more.
    weights = [jnp.exp2(part.top - top) for part in parts]
    whole = sum(jnp.sum(part.total * weight, axis=2) for part, weight in zip(parts, weights, strict=True))
    out = sum(jnp.sum(part.out * weight[..., None], axis=2) for part, weight in zip(parts, weights, strict=True))
    return out / jnp.where(whole == 0, 1, whole)[..., None]


def _singles(part: Partials) -> list[Partials]:
    """Returns a few parts one by one, for which no reduction is launched; many as they are."""
    n = part.top.shape[2]
    if n > FEW:
        return [part]
    return [Partials(*(field[:, :, i : i + 1] for field in part)) for i in range(n)]
