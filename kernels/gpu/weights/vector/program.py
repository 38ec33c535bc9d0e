"""What programs of a row's product have in common: blocks of matrix rows by turns, and what comes next on its way."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, DTypeLike, Float, Int, Num

from kernels.gpu.instructions import paired
from kernels.gpu.weights.layout import Arranged
from kernels.gpu.weights.vector import fixed

Tile = tuple[Array, ...]


@dataclasses.dataclass(frozen=True)
class Program:
    """What is known when the kernel is compiled.

    Args:
        bits: of a code; 16: floats.
        columns: of a block; `words` of a row, `chunk` of them at a time.
        grouped: whether each block has a scale of its own.
        rows: rows of the matrix that are taken at once; `turns` times so many there are.
        programs: which share these turns.

    `WIDE` is how many words a thread loads at once; scales are met once for so many.
    """

    WIDE: ClassVar[int]

    bits: int
    columns: int
    words: int
    chunk: int
    grouped: bool
    rows: int
    turns: int
    programs: int
    interpret: bool

    def __call__(self, x_ref: Any, *refs: Any) -> None:
        *arrays, out_ref = refs
        first = pl.program_id(0)
        tile = self.load(arrays, first, 0)  # before all that is done to x, so that it comes meanwhile
        x = self.prepare(x_ref)

        def turn(i: Int[Array, ""], tile: Tile) -> Tile:
            return self.turn(first + i * self.programs, tile, x, arrays, out_ref)

        jax.lax.fori_loop(0, pl.cdiv(self.turns - first, self.programs), turn, tile)

    def turn(self, at: Int[Array, ""], tile: Tile, x: Any, arrays: Sequence[Any], out_ref: Any) -> Tile:
        """Writes the results of a turn's rows, of which the first chunk is there; returns the next turn's first."""
        total = self.zeros()
        for chunk in range(self.chunks):
            # While one chunk is multiplied, the next one is on its way.
            following = (at, chunk + 1) if chunk + 1 < self.chunks else (at + self.programs, 0)
            coming = self.load(arrays, *following)
            total, tile = self.add(total, tile, x, chunk), coming
        rows = pl.ds(pl.multiple_of(at * self.rows, self.rows), self.rows)
        out_ref[rows] = self.result(total, x, arrays, rows).astype(out_ref.dtype)
        return tile

    @property
    def chunks(self) -> int:
        return -(-self.words // self.chunk)

    def load(self, arrays: Sequence[Any], turn: Int[Array, ""], chunk: int) -> Tile:
        """Returns the numbers of a turn's rows; nothing is read past the last turn."""
        raise NotImplementedError

    def prepare(self, x_ref: Any) -> Any:
        """Returns the row as products take it."""
        raise NotImplementedError

    def zeros(self) -> Num[Array, "rows *any"]:
        """Returns the sum of no products."""
        if self.grouped:
            return jnp.zeros((self.rows, self.chunk // self.WIDE), jnp.float32)
        return jnp.zeros((self.rows, self.chunk), self.sums)

    @property
    def sums(self) -> DTypeLike:
        """What products are summed in, before any scale."""
        return jnp.int32

    def add(self, total: Array, tile: Tile, x: Any, chunk: int) -> Array:
        """Returns a sum with a chunk's products added."""
        raise NotImplementedError

    def result(self, total: Array, x: Any, arrays: Sequence[Any], rows: Any) -> Float[Array, "rows"]:
        """Returns what a turn's rows give."""
        raise NotImplementedError

    def scaled(self, total: Array, power: Float[Array, ""], scales: Any, rows: Any) -> Float[Array, "rows"]:
        """Returns the rows' sums times what fixed point is worth, and times scales that are a row's own."""
        y = jnp.sum(total, axis=1) * fixed.scale(power)
        return y if self.grouped else y * scales[0, rows].astype(jnp.float32)

    def at(self, chunk: int) -> Int[Array, "chunk"]:
        """Returns a chunk's words."""
        return chunk * self.chunk + jnp.arange(self.chunk)

    def over(self, x: Num[Array, "n"]) -> Num[Array, "rows n"]:
        """Returns a row for every row of a turn."""
        return jnp.broadcast_to(x[None], (self.rows, x.shape[0]))

    def read(self, ref: Any, turn: Int[Array, ""], columns: Int[Array, "n"], there: Bool[Array, "n"]) -> Array:
        """Returns the numbers of a turn's rows at these columns, of which some may not be there."""
        rows, mask = self._rows(turn, there)
        read = plgpu.load(ref.at[rows, self.over(columns)], mask=mask, other=jnp.zeros((), ref.dtype))
        (held,) = paired(_held, [read], jnp.int32, 1, self.interpret)
        return held

    def read_scales(self, ref: Any, turn: Int[Array, ""], blocks: Int[Array, "n"]) -> Num[Array, "rows n"]:
        """Returns the scales (blocks, R) of a turn's rows."""
        rows, mask = self._rows(turn, blocks < ref.shape[0])
        return plgpu.load(ref.at[self.over(blocks), rows], mask=mask, other=jnp.zeros((), ref.dtype))

    def _rows(
        self, turn: Int[Array, ""], there: Bool[Array, "n"]
    ) -> tuple[Int[Array, "rows n"], Bool[Array, "rows n"]]:
        """Returns the row of each of a turn's numbers, and whether it is there."""
        rows = (turn * self.rows + jnp.arange(self.rows))[:, None]
        return jnp.broadcast_to(rows, (self.rows, there.shape[0])), self.over(there & (turn < self.turns))


def _held(m: Any, pair: Any) -> tuple[Any, Any]:
    """Returns two 16-bit numbers as one register, and an empty one: what is loaded ahead is not taken apart."""
    return m.either(pair, 0), m.both(pair, 0)


def div(x: Int[Array, "n"], by: int) -> Int[Array, "n"]:
    """Returns x // by of what is not below 0: the compiler sees which neighbours are alike, as it does not of `//`."""
    return jax.lax.div(x, jnp.full_like(x, by))


def rem(x: Int[Array, "n"], by: int) -> Int[Array, "n"]:
    """Returns x % by of what is not below 0."""
    return jax.lax.rem(x, jnp.full_like(x, by))


def combined(sums: Int[Array, "rows n"], each: int) -> Int[Array, "rows n/each"]:
    """Returns the sums of so many neighbours: those of high bytes (at even places) and of low ones.

    They are neighbours on a GPU, too: they come of words that were loaded in wide pieces.
    """
    sums = sums.reshape(sums.shape[0], -1, each)
    high = (jnp.arange(each) % 2 == 0)[None, None]
    return jnp.sum(jnp.where(high, sums << 8, sums), axis=2)


def facts(matrix: Arranged, rows: int, programs: int, interpret: bool) -> dict[str, Any]:
    """Returns what all programs want to know of a matrix."""
    turns = matrix.values.shape[0] // rows
    own = {"bits": matrix.bits, "columns": matrix.columns, "grouped": matrix.grouped}
    return own | {"rows": rows, "turns": turns, "programs": min(programs, turns), "interpret": interpret}
