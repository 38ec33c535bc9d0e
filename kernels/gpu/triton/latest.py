"""The latest tokens, of which a side at least is not settled: exact rows out of rings, and values' codes one by one.

They are few, and after a group has been filled there are none: what costs is only that they be found.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from kernels.gpu.fields import metadata, unit
from kernels.gpu.settled import narrowed
from kernels.gpu.triton.shapes import Shapes, array, columns, dot, load, pick, run_index
from kernels.gpu.triton.values import PackedValues


@dataclasses.dataclass(frozen=True)
class LatestKeys:
    """Keys as exact rows: in a ring, position p in row p mod its size, or, where `ring` is false, all one by one."""

    shapes: Shapes
    rows: Any
    ring: bool
    offset: int
    queries: Float[Array, "d columns"]
    scale: float

    @classmethod
    def of(cls, shapes: Shapes, rows: Any, ring: bool, offset: int, q_ref: Any, scale: float) -> "LatestKeys":
        q = load(q_ref, pl.ds(0, shapes.rows), _channels(shapes))
        q = jnp.where(jnp.arange(shapes.channels)[None] < shapes.d, q, 0).astype(jnp.float16)
        return cls(shapes, rows, ring, offset, columns(q[0] if shapes.rows == 1 else q.T, shapes.wide(1)), scale)

    def scores(self, token: Int[Array, "n"]) -> Float[Array, "n *rows"]:
        k = narrowed(load(self.rows, _rows(self.rows, token, self.ring, self.offset), _channels(self.shapes)))
        return pick(dot(k, self.queries), 0, self.shapes.rows) * self.scale


@dataclasses.dataclass(frozen=True)
class LatestValues:
    """Values as exact rows, or as codes with the latest of all as exact rows in a ring; `end` is behind the last."""

    shapes: Shapes
    first: Int[Array, ""]
    end: Int[Array, ""]
    codes: PackedValues | None
    rows: Any
    offset: int

    def empty(self) -> tuple[Array, ...]:
        return (jnp.zeros((self.shapes.channels, self.shapes.wide(1)), jnp.float32),)

    def tokens(self, step: Int[Array, ""]) -> Int[Array, "n"]:
        """Returns a step's tokens; what is past the last one is to be masked."""
        return self.first + step * self.shapes.tokens + jnp.arange(self.shapes.tokens)

    def add(
        self, sums: tuple[Array, ...], weights: list[Float[Array, "n *rows"]], step: Int[Array, ""]
    ) -> tuple[Array, ...]:
        """Returns the sums with a step's tokens added."""
        (product,), (p,) = sums, weights
        return (product + dot(self._values(self.tokens(step)), columns(p.astype(jnp.float16), product.shape[1])),)

    def out(self, sums: tuple[Array, ...]) -> Float[Array, "channels *rows"]:
        return pick(sums[0], 0, self.shapes.rows)

    def _values(self, token: Int[Array, "n"]) -> Float[Array, "channels n"]:
        if self.codes is None:
            return self._exact(token, ring=False)
        decoded = narrowed(self._decoded(jnp.minimum(token, self.shapes.capacity - 1)))
        if self.rows is None:
            return decoded
        kept = token >= self.end - self.rows.shape[0]
        return jnp.where(kept[None], self._exact(token, ring=True), decoded)

    def _exact(self, token: Int[Array, "n"], ring: bool) -> Float[Array, "channels n"]:
        return narrowed(load(self.rows, _rows(self.rows, token, ring, self.offset), _channels(self.shapes))).T

    def _decoded(self, token: Int[Array, "n"]) -> Float[Array, "channels n"]:
        """Returns tokens' values by plain arithmetic: they lie in words beside others that are not wanted."""
        values = self.codes
        assert values is not None
        channel = array(_channels(self.shapes))
        code, levels = jnp.zeros((channel.size, token.size), jnp.int32), 1
        for plane, own in zip(values.planes, values.fields, strict=True):
            width, turn = own[0].width, token // values.run
            word = load(plane, channel, turn // len(own) * values.run + token % values.run).astype(jnp.int32)
            field = (word >> (turn % len(own) * width)[None]) & ((1 << width) - 1)
            code, levels = (code << width) | field, levels << width
        group = jnp.minimum(channel // values.group, values.span.shape[0] - 1)
        span, zero = (metadata(load(ref, group, token)) * unit(ref) for ref in (values.span, values.zero))
        return code.astype(jnp.float32) * (span * (1 / (levels - 1))) + zero


def _channels(shapes: Shapes) -> Any:
    return run_index(0, shapes.d, shapes.channels)


def _rows(rows: Any, token: Int[Array, "n"], ring: bool, offset: int) -> Int[Array, "n"]:
    return token % rows.shape[0] if ring else jnp.minimum(token + offset, rows.shape[0] - 1)
