"""Scores of a tile of keys: from words in the matrix units, or from rows of 16-bit numbers."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from kernels.gpu.fields import WHOLE, Field, a_byte_further, fields, metadata, numbers, unit
from kernels.gpu.triton.shapes import COLUMNS, NARROWEST, Shapes, accumulate, columns, dot, load, pick, power, run_index


@dataclasses.dataclass(frozen=True)
class PackedKeys:
    """Keys as words (s, w) a plane; spans and zeros (s / group, d); the queries, read as each field meets them."""

    shapes: Shapes
    planes: list[Any]
    span: Any
    zero: Any
    fields: list[list[Field]]
    group: int
    q_ref: Any
    scale: float

    @classmethod
    def of(cls, shapes: Shapes, refs: list[Any], bits: int, group: int, q_ref: Any, scale: float) -> "PackedKeys":
        *planes, span, zero = refs
        return cls(shapes, planes, span, zero, fields(bits), group, q_ref, scale)

    def together(self, tiles: int, stride: int) -> int:
        """Returns how many tiles share their operands: while they adjoin, and their groups fit a product's columns."""
        lanes = self.shapes.lanes
        return max(min(tiles, COLUMNS * self.group // (self.shapes.rows * lanes)), 1) if stride == lanes else 1

    def operands(self, first: Int[Array, ""], tiles: int) -> tuple[list[list[Array]], Array]:
        """Returns what each field is multiplied with, a column a group and query row, and what each column adds.

        They serve so many adjoining tiles.
        """
        group = jnp.minimum(first // self.group + jnp.arange(self._blocks(tiles)), self.span.shape[0] - 1)
        first_field, *others = self._met(self.zero, group, 0)
        added = jnp.sum(sum(others, first_field), axis=1)
        factors = [
            [
                _filled((x * field.factor).astype(jnp.float16).T)
                for x, field in zip(self._met(self.span, group, i), own, strict=True)
            ]
            for i, own in enumerate(self.fields)
        ]
        return factors, _filled(added[None])[0]

    def _met(self, meta: Any, group: Int[Array, "blocks"], number: int) -> Iterator[Float[Array, "blocks*rows w"]]:
        """Yields, for each field of a plane, its queries times the metadata of these groups."""
        plane = self.planes[number]
        for field in self.fields[number]:
            q = _query(self.shapes, self.q_ref, plane, field) * self.scale
            x = metadata(load(meta, group, _channels(self.shapes, plane, field)))
            yield self._each(x, q * unit(meta))

    def _blocks(self, tiles: int) -> int:
        """Returns how many groups the tokens of adjoining tiles lie in."""
        return max(tiles * self.shapes.lanes // self.group, 1)

    def _each(self, x: Float[Array, "blocks w"], q: Float[Array, "rows w"]) -> Float[Array, "blocks*rows w"]:
        return x * q if self.shapes.rows == 1 else (x[:, None] * q[None]).reshape(-1, q.shape[1])

    def scores(
        self, operands: tuple[list[list[Array]], Array], tile: int, tiles: int, rows: Any
    ) -> Float[Array, "n *rows"]:
        """Returns the scores of a tile in these rows, by its number among those that share the operands."""
        factors, added = operands
        shapes = self.shapes
        total = jnp.zeros((shapes.tokens, added.shape[0]), jnp.float32)
        for plane, own, each in zip(self.planes, self.fields, factors, strict=True):
            word = load(plane, rows, run_index(0, plane.shape[1], _wide(plane)))
            shifted = a_byte_further(word, shapes.interpret)
            for field, factor in zip(own, each, strict=True):
                total = accumulate(total, numbers(word, shifted, field, shapes.interpret), factor)
        token = tile * shapes.lanes + jnp.arange(shapes.tokens) % shapes.lanes
        return pick(total * WHOLE + added[None], token // self.group if self._blocks(tiles) > 1 else 0, shapes.rows)


@dataclasses.dataclass(frozen=True)
class DenseKeys:
    """Keys as rows (s, d) of 16-bit numbers."""

    shapes: Shapes
    k: Any
    queries: Float[Array, "d columns"]
    scale: float

    @classmethod
    def of(cls, shapes: Shapes, ref: Any, q_ref: Any, scale: float) -> "DenseKeys":
        q = load(q_ref, pl.ds(0, shapes.rows), run_index(0, shapes.d, shapes.channels))
        q = jnp.where(jnp.arange(shapes.channels)[None] < shapes.d, q, 0).astype(ref.dtype)
        return cls(shapes, ref, columns(q[0] if shapes.rows == 1 else q.T, shapes.wide(1)), scale)

    def together(self, tiles: int, stride: int) -> int:
        return tiles

    def operands(self, first: Int[Array, ""], tiles: int) -> None:
        return None

    def scores(self, operands: None, tile: int, tiles: int, rows: Any) -> Float[Array, "n *rows"]:
        """Returns the scores of the tile in these rows."""
        k = load(self.k, rows, run_index(0, self.shapes.d, self.shapes.channels))
        return pick(dot(k, self.queries), 0, self.shapes.rows) * self.scale


def _filled(x: Float[Array, "n m"]) -> Float[Array, "n columns"]:
    """Returns x with its columns repeated until they fill the narrowest product."""
    n, m = x.shape
    return x if m >= COLUMNS else jnp.broadcast_to(x[:, None], (n, COLUMNS // m, m)).reshape(n, COLUMNS)


def _wide(plane: Any) -> int:
    return max(power(plane.shape[1]), NARROWEST)


def _channels(shapes: Shapes, plane: Any, field: Field) -> Any:
    """Returns which channels a field of all words of a token holds; past the end, some that are there."""
    first = field.index * plane.shape[1]
    at = run_index(first, plane.shape[1], _wide(plane))
    if first + plane.shape[1] <= shapes.d:
        return at
    return jnp.minimum(first + jnp.arange(_wide(plane)) % plane.shape[1], shapes.d - 1)


def _query(shapes: Shapes, q_ref: Any, plane: Any, field: Field) -> Float[Array, "rows w"]:
    """Returns the queries' channels that a field holds, zero where it holds none."""
    word = jnp.arange(_wide(plane))
    real = (word < plane.shape[1]) & (field.index * plane.shape[1] + word < shapes.d)
    q = load(q_ref, pl.ds(0, shapes.rows), _channels(shapes, plane, field))
    return jnp.where(real[None], q, 0)
