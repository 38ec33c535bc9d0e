"""One layer's keys and values as its attention reads them back from the cache, at a width that is data."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels import hadamard
from kernels.rope import Rotation, rotate
from lmmjax import llava
from lmmjax.cache import empty_search_cache
from lmmjax.config import LlavaConfig
from lmmjax.likelihood import Batch
from lmmjax.plan import CacheFormat


class Sides(NamedTuple):
    """One layer's keys and values, or what belongs to them."""

    keys: Float[Array, "b k t d"]
    values: Float[Array, "b k t d"]


def given_back(config: LlavaConfig, form: CacheFormat, bits: Int[Array, ""], kv: Sides, batch: Batch) -> Sides:
    """Returns a layer's keys (after RoPE) and values as its attention reads them from the cache, whole prompts stored.

    Both are rounded to `bits`, in float32. The window is left out and exact tokens keep their precision: what is
    measured is the rounding alone. A rotation by Hadamard is undone, which the queries or the output would otherwise
    be given too.
    """
    turn = llava.turn(config, positions(batch))
    stored = kv if form.keys == "before_rope" else turned(kv, turn)
    rotated = (form.rotate_keys, form.rotate_values != "no")
    stored = [hadamard.rotate(x) if on else x for x, on in zip(stored, rotated, strict=True)]
    read = _through_stores(config, form, bits, stored, batch)
    held = Sides(*(hadamard.rotate(x) if on else x for x, on in zip(read, rotated, strict=True)))
    return turned(held, turn) if form.keys == "before_rope" else held


def _through_stores(
    config: LlavaConfig, form: CacheFormat, bits: Int[Array, ""], stored: Sequence[Array], batch: Batch
) -> list[Array]:
    """Returns what a layer's two stores give back of what is put into them."""
    b, _, t, _ = stored[0].shape
    text, plain = dataclasses.replace(config.text, layers=1), dataclasses.replace(form, window=0, dtype="float32")
    cache = empty_search_cache(text, plain, bits[None], bits[None], b, t).mark(batch.visual, batch.lengths)
    starts, (stores,) = jnp.zeros_like(batch.lengths), cache.layers
    filled = [store.append(x, starts, batch.lengths, cache.visual) for store, x in zip(stores, stored, strict=True)]
    return [store.read(batch.lengths, cache.visual)[:, :, :t] for store in filled]


def turned(kv: Sides, turn: Rotation) -> Sides:
    """Returns keys and values with RoPE; orthogonal, so a slope by turned keys is the turned slope."""
    return Sides(rotate(kv.keys, turn), kv.values)


def positions(batch: Batch) -> Int[Array, "b t"]:
    """Returns the positions of a batch's tokens."""
    b, t = batch.x.shape[:2]
    return jnp.broadcast_to(jnp.arange(t), (b, t))
