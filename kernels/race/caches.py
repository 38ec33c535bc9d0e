"""Caches of random bytes, all rows full: shapes and formats, made on the device without quantizing anything."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from kernels.metadata import Metadata
from kernels.quantize import Quantizer
from kernels.race import noise
from kernels.race.noise import normal, uniform
from kernels.stores import Dense, Packed, Store
from kernels.stores.base import Side


class Shape(NamedTuple):
    """One query a row and head over `tokens` cached tokens a row."""

    batch: int
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def name(self) -> str:
        return f"{self.batch}x{self.tokens} {self.heads}/{self.kv_heads}"

    @property
    def cached(self) -> int:
        """Tokens of all rows together."""
        return self.batch * self.tokens

    @property
    def side(self) -> tuple[int, int, int, int]:
        """The shape of one side of the cache."""
        return self.batch, self.kv_heads, self.tokens, self.head_dim

    @property
    def nbytes(self) -> int:
        """Bytes of both sides in bfloat16."""
        return 4 * math.prod(self.side)


class Scheme(NamedTuple):
    """How a cache is quantized, but for its bits: KIVI's axes, and no window."""

    group: int
    metadata: Metadata

    @property
    def name(self) -> str:
        return f"g{self.group}-{self.metadata}"

    def quantizer(self, side: Side, head_dim: int) -> Quantizer:
        if side == "keys":
            return Quantizer("tokens", self.group, metadata=self.metadata)
        return Quantizer("channels", min(self.group, head_dim), metadata=self.metadata)


class Layer(NamedTuple):
    """One layer's cache; every row is full."""

    keys: Store
    values: Store
    lengths: Int[Array, "b"]

    @property
    def nbytes(self) -> int:
        """Bytes that attention must read. The ring of the latest keys is none of them: here all of them are settled."""
        return sum(bytes_read(store) for store in (self.keys, self.values))


def abstract(shape: Shape, scheme: Scheme | None, bits: int) -> Layer:
    """Returns the layer's cache as shapes without numbers."""
    return jax.eval_shape(functools.partial(random_layer, shape=shape, scheme=scheme, bits=bits), 0)


@functools.partial(jax.jit, static_argnames=("shape", "scheme", "bits"))
def random_layer(seed: Int[Array, ""], shape: Shape, scheme: Scheme | None, bits: int) -> Layer:
    """Returns a full layer; 16 bits without a scheme are exact."""
    lengths = jnp.full(shape.batch, shape.tokens)
    if scheme is None:
        return Layer(Dense(normal(2 * seed, shape.side)), Dense(normal(2 * seed + 1, shape.side)), lengths)
    keys = _packed(2 * seed, shape, scheme, bits, "keys")
    return Layer(keys, _packed(2 * seed + 1, shape, scheme, bits, "values"), lengths)


def randomized(like: Dense | Packed, seed: Int[Array, ""] | int) -> Store:
    """Returns a store of this geometry with all codes equally likely, in groups that reach as far as normal values."""
    if isinstance(like, Dense):
        return like.replace(values=normal(seed, like.values.shape))
    return like.replace(
        codes=tuple(noise.bits(8 * seed + i, x.shape).astype(x.dtype) for i, x in enumerate(like.codes)),
        span=uniform(8 * seed + 2, like.span.shape, 4, 6).astype(like.span.dtype),
        zero=uniform(8 * seed + 3, like.zero.shape, -3, -2).astype(like.zero.dtype),
        recent=normal(8 * seed + 4, like.recent.shape),
    )


def _packed(seed: Int[Array, ""], shape: Shape, scheme: Scheme, bits: int, side: Side) -> Store:
    quantizer = scheme.quantizer(side, shape.head_dim)
    like = jax.eval_shape(lambda: Packed.empty(shape.side, bits, side, quantizer, 0, jnp.bfloat16))
    return randomized(like, seed)


def bytes_read(store: Store) -> int:
    """Returns the bytes of a store that attention reads where all is settled."""
    sizes = store.sizes
    return sizes["exact"] if store.exact else sizes["codes"] + sizes["scales"]
