"""The program for every weight kept: 32 bits of codes are multiplied as they are, or after a mask and a shift."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels.gpu.instructions import paired
from kernels.gpu.weights.layout import OFFSET
from kernels.gpu.weights.vector import fixed
from kernels.gpu.weights.vector.fixed import Bytes
from kernels.gpu.weights.vector.program import Program, Tile, combined, div


class Row(NamedTuple):
    """A row in fixed point, chunk by chunk; `less` is what codes' offset adds to a chunk's sums."""

    power: Float[Array, ""]
    chunks: list[list[Bytes]]
    less: list[Int[Array, "chunk/8"]]


@dataclasses.dataclass(frozen=True)
class Dense(Program):
    """Of 8 or 4 bits. A sum's even places hold products of high bytes, its odd ones of low bytes."""

    WIDE: ClassVar[int] = 8  # 16 bytes

    def load(self, arrays: Sequence[Any], turn: Int[Array, ""], chunk: int) -> Tile:
        words, scales = arrays
        at = self.at(chunk)
        tile = self.read(words, turn, at, at < self.words)
        if not self.grouped:
            return (tile,)
        blocks = div(chunk * self.chunk + self.WIDE * jnp.arange(self.chunk // self.WIDE), self.columns)
        return tile, self.read_scales(scales, turn, blocks)

    def prepare(self, x_ref: Any) -> Row:
        planes = 16 // self.bits
        x = [[fixed.load(x_ref, self.at(chunk) * planes + i) for i in range(planes)] for chunk in range(self.chunks)]
        power = fixed.power([part for parts in x for part in parts])
        whole = [[fixed.whole(part, power) for part in parts] for parts in x]
        return Row(power, [self._bytes(parts) for parts in whole], [self._less(parts) for parts in whole])

    def add(self, total: Array, tile: Tile, x: Row, chunk: int) -> Array:
        parts = [self.over(half) for part in x.chunks[chunk] for half in part]
        start = jnp.zeros((self.rows, self.chunk), self.sums) if self.grouped else total
        (sums,) = paired(_DOTS[self.bits], [tile[0], *parts, start], jnp.int32, 1, self.interpret)
        if not self.grouped:
            return sums
        return total + self._exact(sums, x.less[chunk]) * tile[1].astype(jnp.float32)

    def result(self, total: Array, x: Row, arrays: Sequence[Any], rows: Any) -> Float[Array, "rows"]:
        if not self.grouped:
            total = self._exact(total, sum(x.less[1:], x.less[0]))
        return self.scaled(total, x.power, arrays[1], rows)

    def _exact(self, sums: Int[Array, "rows chunk"], less: Int[Array, "chunk/8"]) -> Float[Array, "rows chunk/8"]:
        """Returns the sums of codes without their offset."""
        return (combined(sums, self.WIDE) - self.over(less)).astype(jnp.float32)

    def _bytes(self, whole: list[Array]) -> list[Bytes]:
        """Returns the bytes of a chunk's inputs; for 4 bits, those of lower nibbles and then those of upper ones."""
        pairs = [whole] if len(whole) == 2 else [whole[::2], whole[1::2]]
        return [fixed.bytes_of(pair, self.interpret) for pair in pairs]

    def _less(self, whole: list[Array]) -> Int[Array, "chunk/8"]:
        """Returns what codes' offset adds to the sums of neighbours."""
        first, *others = (part << 16 >> 16 for part in whole)
        total = sum(others, first)
        return OFFSET[self.bits] * jnp.sum(total.reshape(-1, self.WIDE), axis=1)


def _dot8(m: Any, codes: Any, _: Any, high: Any, low: Any, a: Any, b: Any) -> tuple[Any, Any]:
    return m.dot(codes, high, a, (False, True)), m.dot(codes, low, b, (False, False))


def _dot4(m: Any, codes: Any, _: Any, high: Any, low: Any, high2: Any, low2: Any, a: Any, b: Any) -> tuple[Any, Any]:
    lower, upper = m.both(codes, 0x0F0F0F0F), m.both(m.down(codes, 4), 0x0F0F0F0F)
    return _dot8(m, upper, _, high2, low2, *_dot8(m, lower, _, high, low, a, b))


_DOTS = {8: _dot8, 4: _dot4}
