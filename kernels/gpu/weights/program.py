"""One program of a product: its share of the inputs, for a block of rows of the matrix, as the matrix units want it."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int, Num

from kernels.gpu.fields import a_byte_further, fields, numbers
from kernels.gpu.triton.shapes import dot, pick
from kernels.gpu.weights.layout import OFFSET, TILE, Arranged, Pairs
from kernels.gpu.weights.pairs import masks, placed
from kernels.gpu.weights.tiles import Tiles

FLOAT = 16
"""Stands for the bits of a code where values are floats."""


@dataclasses.dataclass(frozen=True)
class Program:
    """What is known when the kernel is compiled.

    Args:
        bits: of a code; `FLOAT`: floats.
        columns: of a block; `blocks` of them make a row, and `step` of them a step.
        pairs, grouped: whether two of four are kept, and whether each block has scales of its own.
        rows, results: rows of the matrix, and rows of x whose results are wanted.
        splits: programs that share a row's inputs.
    """

    bits: int
    columns: int
    blocks: int
    step: int
    pairs: bool
    grouped: bool
    rows: int
    results: int
    splits: int
    interpret: bool

    @classmethod
    def of(cls, matrix: Arranged, tiles: Tiles, results: int, interpret: bool) -> "Program":
        bits = FLOAT if matrix.scales is None else matrix.bits
        blocks, pairs = (matrix.columns, matrix.blocks, tiles.step), isinstance(matrix, Pairs)
        return cls(bits, *blocks, pairs, matrix.grouped, tiles.rows, results, tiles.splits, interpret)

    def __call__(self, *refs: Any) -> None:
        x_ref, *arrays, out_ref = refs
        sums_ref = arrays.pop(0) if self.bits < FLOAT else None
        factors_ref = arrays.pop(0) if x_ref.dtype == jnp.float16 else None
        scales_ref = arrays.pop(0) if self.grouped else None
        steps = self.blocks // self.step
        each = pl.cdiv(steps, self.splits)
        low = jnp.minimum(pl.program_id(1) * each, steps)

        def step(at: Int[Array, ""], total: Array) -> Array:
            for i, planes in enumerate(self._step(at, arrays)):
                block = at * self.step + i
                if factors_ref is None:
                    total = self._added(total, planes, x_ref, block)
                    continue
                own = self._added(jnp.zeros_like(total), planes, x_ref, block)
                own = (own if sums_ref is None else own - sums_ref[block, :][None]) * factors_ref[block, :][None]
                total += own if scales_ref is None else own * scales_ref[block, :].astype(jnp.float32)[:, None]
            return total

        zeros = jnp.zeros((self.rows, x_ref.shape[2]), jnp.float32)
        total = jax.lax.fori_loop(low, jnp.minimum(low + each, steps), step, zeros)
        out_ref[...] = pick(total, 0, self.results).reshape(out_ref.shape)

    def _added(self, total: Array, planes: list[Array], x_ref: Any, block: Int[Array, ""]) -> Float[Array, "rows m"]:
        """Returns a sum with the products of a block's planes added."""
        inputs = pl.ds(pl.multiple_of(block * self.columns, self.columns), self.columns)
        for plane, weights in enumerate(planes):
            total += dot(weights, x_ref[plane, inputs, :])
        return total

    def _step(self, at: Int[Array, ""], refs: list[Any]) -> Iterator[list[Num[Array, "rows c"]]]:
        """Yields a step's blocks, each as the weights of its planes."""
        if self.pairs:
            yield from self._tile(at, *refs)
            return
        for i in range(self.step):
            yield self._fields(self._load(refs[0], at * self.step + i))

    def _tile(self, at: Int[Array, ""], values: Any, mask: Any) -> Iterator[list[Num[Array, "rows c"]]]:
        kept = masks(self._load(mask, at), self.interpret)
        held = FLOAT // self.bits
        for block in range(0, TILE, held):
            words = [self._load(values, (at * TILE + block) // held * 2 + i) for i in range(2)]
            for i, (first, second) in enumerate(zip(*map(self._fields, words), strict=True)):
                own = kept[4 * (block + i) :][:4]
                yield placed(own, first, second, self._dropped(i), self.interpret)

    def _dropped(self, field: int) -> int:
        """Returns the bits of a weight that is dropped: 0, or the number of code 0 in a field."""
        return 0 if self.bits == FLOAT else OFFSET[self.bits] << fields(self.bits)[0][field].place

    def _fields(self, word: Num[Array, "rows c"]) -> list[Float[Array, "rows c"]]:
        """Returns the fields of words as numbers; of floats, these."""
        if self.bits == FLOAT:
            return [word]
        further = a_byte_further(word, self.interpret)
        return [numbers(word, further, field, self.interpret) for field in fields(self.bits)[0]]

    def _load(self, ref: Any, number: Any) -> Num[Array, "rows c"]:
        return ref[:, pl.ds(pl.multiple_of(number * self.columns, self.columns), self.columns)]
