"""Values of a tile, weighted and added up: from words in the matrix units, or from rows of 16-bit numbers."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from kernels.gpu.fields import LIFT, WHOLE, Field, a_byte_further, fields, further, metadata, numbers, unit
from kernels.gpu.triton.shapes import (
    COLUMNS,
    Shapes,
    accumulate,
    array,
    columns,
    dot,
    load,
    outer,
    pick,
    power,
    run_index,
)

Sums = tuple[Array, ...]
MOST = 8
"""The most tiles of a step, for one query row and one plane. With more a kernel spills, and compiles for minutes."""


@dataclasses.dataclass(frozen=True)
class PackedValues:
    """Values as words (d, s / fields) a plane; spans and zeros (d / group, s).

    A step takes as many tiles as words have fields, all tokens of the words that it loads; or a share of them.
    Its sums are the product's, a column a group of channels and query row, and what these still lack, a row a token.
    """

    shapes: Shapes
    planes: list[Any]
    span: Any
    zero: Any
    fields: list[list[Field]]
    group: int
    run: int

    @classmethod
    def of(cls, shapes: Shapes, refs: list[Any], bits: int, group: int, run: int) -> "PackedValues":
        *planes, span, zero = refs
        return cls(shapes, planes, span, zero, fields(bits), group, run)

    @property
    def lift(self) -> float:
        """By how much weights are larger while they are float16: so much that the largest field's are `LIFT` spans."""
        return LIFT / max(field.factor for own in self.fields for field in own)

    @property
    def tiles(self) -> int:
        """The tiles of a step."""
        simple = self.shapes.rows == 1 and len(self.fields) == 1
        return min(max(len(own) for own in self.fields), MOST if simple else MOST // 2)

    @property
    def stride(self) -> int:
        """The tokens from one tile of a step to the next."""
        return self.run

    @property
    def blocks(self) -> int:
        """Blocks of columns: one a group of channels, and as many as fill the narrowest product."""
        groups = power(self.span.shape[0])
        return groups if groups == 1 else max(groups, COLUMNS // self.shapes.rows)

    @property
    def inside(self) -> int:
        """The steps that runs are cut into, where they are longer than a tile."""
        return self.run // self.shapes.lanes

    def steps(self, count: Int[Array, ""]) -> Int[Array, ""]:
        """Returns how many steps so many tokens take."""
        return pl.cdiv(count, self.tiles * self.run) * self.inside

    def first(self, step: Int[Array, ""]) -> Int[Array, ""]:
        """Returns the first token of a step."""
        return step // self.inside * (self.tiles * self.run) + step % self.inside * self.shapes.lanes

    def empty(self) -> Sums:
        shapes, each = self.shapes, self.shapes.each
        if self.blocks > 1:
            each = (self.blocks * shapes.rows,)
        return tuple(
            jnp.zeros(shape, jnp.float32)
            for shape in ((shapes.channels, shapes.wide(self.blocks)), (shapes.tokens, *each))
        )

    def add(self, sums: Sums, weights: list[Float[Array, "n *rows"]], step: Int[Array, ""]) -> Sums:
        """Returns the sums with a step's tiles added."""
        product, lacking = sums
        wide, spans = product.shape[1], []
        for tile, p in enumerate(weights):
            start = self.first(step) + tile * self.stride
            span, zero = (self._metadata(ref, start) for ref in (self.span, self.zero))
            scaled = p * (unit(self.span) * self.lift)
            met = outer(span, scaled)
            spans.append([met * own[0].unit for own in self.fields])
            lacking += outer(zero, scaled)
        own = jnp.zeros_like(product)  # a short sum, of which less is cut off
        for tile, field, word, shifted in self._tiles(step):
            x = (spans[tile][field.plane] * 0.5**field.place).astype(jnp.float16)
            own = accumulate(own, numbers(word, shifted, field, self.shapes.interpret), columns(x, wide))
        return product + own, lacking

    def out(self, sums: Sums) -> Float[Array, "channels *rows"]:
        """Returns the weighted sum of values."""
        product, lacking = sums[0] * (WHOLE / self.lift), sums[1] * (1 / self.lift)
        less = jnp.sum(lacking, axis=0)
        if self.blocks == 1:
            return pick(product, 0, self.shapes.rows) + less
        group = jnp.minimum(jnp.arange(self.shapes.channels) // self.group, self.blocks - 1)
        return pick(product + less[None], group, self.shapes.rows)

    def _metadata(self, ref: Any, start: Int[Array, ""]) -> Float[Array, "n *blocks"]:
        tokens = self.shapes.lane_index(start)
        if self.blocks == 1:
            return metadata(ref[0, tokens])
        shape = (self.shapes.tokens, self.blocks)
        group = jnp.broadcast_to(array(run_index(0, ref.shape[0], self.blocks))[None], shape)
        return metadata(ref[group, jnp.broadcast_to(array(tokens)[:, None], shape)])

    def _tiles(self, step: Int[Array, ""]) -> Iterator[tuple[int, Field, Array, Array]]:
        """Yields each tile of a step by its number, plane by plane: the field of which words, and these a byte on."""
        runs, interpret = step // self.inside * self.tiles, self.shapes.interpret
        for plane, own in zip(self.planes, self.fields, strict=True):
            for block in range(0, self.tiles, len(own)):
                start = (runs + block) // len(own) * self.run + step % self.inside * self.shapes.lanes
                word = self._words(plane, start)
                if len(own) > self.tiles:
                    # The other fields are other steps'; this one's are brought to where the first ones lie.
                    steps = len(own) // self.tiles
                    word = further(word, runs // self.tiles % steps * (16 // steps), interpret)
                shifted = a_byte_further(word, interpret)
                yield from ((block + field.index, field, word, shifted) for field in own[: self.tiles])

    def _words(self, plane: Any, start: Int[Array, ""]) -> Int[Array, "channels n"]:
        rows = run_index(0, self.shapes.d, self.shapes.channels)
        return load(plane, rows, self.shapes.lane_index(start))


@dataclasses.dataclass(frozen=True)
class DenseValues:
    """Values as rows (s, d) of 16-bit numbers; `tiles` of them a step."""

    shapes: Shapes
    v: Any
    offset: int
    tiles: int

    @property
    def stride(self) -> int:
        return self.shapes.tokens

    def steps(self, count: Int[Array, ""]) -> Int[Array, ""]:
        """Returns how many steps so many tokens take."""
        return pl.cdiv(count, self.tiles * self.stride)

    def first(self, step: Int[Array, ""]) -> Int[Array, ""]:
        """Returns the first token of a step."""
        return step * (self.tiles * self.stride)

    def empty(self) -> Sums:
        return (jnp.zeros((self.shapes.channels, self.shapes.wide(1)), jnp.float32),)

    def add(self, sums: Sums, weights: list[Float[Array, "n *rows"]], step: Int[Array, ""]) -> Sums:
        """Returns the sums with a step's tiles added."""
        (product,) = sums
        exact = self.shapes.capacity % (self.tiles * self.stride) == 0
        for tile, p in enumerate(weights):
            rows = self.shapes.row_index(self.first(step) + tile * self.stride, self.offset, exact)
            v = load(self.v, rows, run_index(0, self.shapes.d, self.shapes.channels))
            product += dot(v.T, columns(p.astype(v.dtype), product.shape[1]))
        return (product,)

    def out(self, sums: Sums) -> Float[Array, "channels *rows"]:
        """Returns the weighted sum of values."""
        return pick(sums[0], 0, self.shapes.rows)
