"""The program for two of every four weights: bits become places, and places choose the inputs that values meet."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int

from kernels.gpu.instructions import paired
from kernels.gpu.weights.layout import OFFSET, TILE
from kernels.gpu.weights.vector import fixed
from kernels.gpu.weights.vector.fixed import Bytes
from kernels.gpu.weights.vector.program import Program, Tile, combined, div, rem

FLOAT = 16
"""The bits of values that are floats: bfloat16."""
_LESS = (256 - OFFSET[4]) * 0x01010101
"""Four bytes of what takes the offset from a code."""


class Row(NamedTuple):
    """A row, chunk by chunk, for each block of a tile: the bytes of fixed point, or those of bfloat16."""

    power: Float[Array, ""] | None
    chunks: list[list[Bytes]]


@dataclasses.dataclass(frozen=True)
class Pairs(Program):
    """Of 16, 8 or 4 bits; words are those of the masks. Codes' sums lie as in `Dense`, floats' are a word's own."""

    WIDE: ClassVar[int] = 2  # what registers pair: more would leave the inputs to fewer threads

    @property
    def fields(self) -> int:
        return FLOAT // self.bits

    @property
    def sums(self) -> DTypeLike:
        return jnp.float32 if self.bits == FLOAT else jnp.int32

    def load(self, arrays: Sequence[Any], turn: Int[Array, ""], chunk: int) -> Tile:
        mask, values, *scales = arrays
        at, there = self.at(chunk), self.at(chunk) < self.words
        two = div(at, self.WIDE) * self.WIDE + rem(at, self.WIDE)  # `at`, but in twos: see WIDE
        first = two + div(at, self.columns) * (2 * TILE * self.columns // self.fields - self.columns)
        tile = [self.read(mask, turn, two, there)]
        tile += [self.read(values, turn, first + i * self.columns, there) for i in range(2 * TILE // self.fields)]
        if self.grouped:
            first = chunk * self.chunk + self.WIDE * jnp.arange(self.chunk // self.WIDE)
            blocks = TILE * div(first, self.columns)
            tile += [self.read_scales(scales[0], turn, blocks + i) for i in range(TILE)]
        return tuple(tile)

    def prepare(self, x_ref: Any) -> Row:
        x = [[self._inputs(x_ref, chunk, i) for i in range(TILE)] for chunk in range(self.chunks)]
        power = None if self.bits == FLOAT else fixed.power([one for fours in x for four in fours for one in four])

        def prepared(four: list[Array]) -> Bytes:
            whole = [_bits(one) if power is None else fixed.whole(one, power) for one in four]
            return fixed.bytes_of(whole, self.interpret)

        return Row(power, [[prepared(four) for four in fours] for fours in x])

    def add(self, total: Array, tile: Tile, x: Row, chunk: int) -> Array:
        mask, *values = tile
        places = paired(_places, [mask], jnp.int16, 2, self.interpret)
        none = jnp.zeros((self.rows, self.chunk), jnp.int32)
        for i in range(TILE):
            held = values[i // self.fields * 2 :][:2]
            args = [places[i % 2], *held, *map(self.over, x.chunks[chunk][i])]
            if self.grouped:
                (sums,) = paired(_whole(self._body(i)), [*args, none], jnp.int32, 1, self.interpret)
                own = jnp.sum(sums.reshape(self.rows, -1, self.WIDE), axis=2).astype(jnp.float32)
                total += own * tile[i - TILE].astype(jnp.float32)
            else:
                (total,) = paired(self._body(i), [*args, total], total.dtype, 1, self.interpret)
        return total

    def result(self, total: Array, x: Row, arrays: Sequence[Any], rows: Any) -> Float[Array, "rows"]:
        if x.power is None:
            return jnp.sum(total, axis=1)
        own = total if self.grouped else combined(total, self.WIDE).astype(jnp.float32)
        return self.scaled(own, x.power, arrays[2], rows)

    def _inputs(self, x_ref: Any, chunk: int, i: int) -> list[Float[Array, "chunk"]]:
        """Returns the fours of inputs that the words of a chunk's i-th blocks meet."""
        block = TILE * div(self.at(chunk), self.columns) + i
        first = 4 * (block * self.columns + rem(self.at(chunk), self.columns))
        return [fixed.load(x_ref, first + j) for j in range(4)]

    def _body(self, i: int) -> Any:
        return {FLOAT: _floats, 8: _codes8, 4: _codes4}[self.bits](i)


def _places(m: Any, mask: Any, _: Any) -> tuple[Any, Any]:
    """Returns, for even and for odd blocks, a byte for every four: the places of its first value and of its second."""
    not_, one, two, three = m.inverse(mask), m.down(mask, 1), m.down(mask, 2), m.down(mask, 3)
    neither = m.inverse(m.either(mask, m.up(mask, 1)))
    first = m.either(m.both(m.both(not_, one), 0x11111111), m.both(neither, 0x22222222))
    last = m.both(m.either(three, m.inverse(two)), 0x11111111)
    second = m.either(last, m.both(m.either(two, one), 0x22222222))
    even = m.either(m.both(first, 0x0F0F0F0F), m.up(m.both(second, 0x0F0F0F0F), 4))
    odd = m.either(m.both(m.down(first, 4), 0x0F0F0F0F), m.both(second, 0xF0F0F0F0))
    return even, odd


def _met(m: Any, i: int, places: Any, *bytes_: Any) -> tuple[Any, Any]:
    """Returns the high and the low bytes that the values of two words' i-th fours meet."""
    own = m.either(m.choose(places, 0, i // 2 * 0x11 + 0x20), 0x4400)
    return m.choose(*bytes_[:2], own), m.choose(*bytes_[2:], own)


def _codes8(i: int) -> Any:
    field = i % 2 * 0x1111 + 0x6240

    def body(m: Any, places: Any, first: Any, _: Any, second: Any, _2: Any, *more: Any) -> tuple[Any, Any]:
        *x, a, b = more
        codes = m.unlike(m.choose(first, second, field), 0x80808080)
        high, low = _met(m, i, places, *x)
        return m.dot(codes, high, a, (True, True)), m.dot(codes, low, b, (True, False))

    return body


def _codes4(i: int) -> Any:
    def body(m: Any, places: Any, first: Any, _: Any, second: Any, _2: Any, *more: Any) -> tuple[Any, Any]:
        *x, a, b = more
        upper = m.down(second, 4 * i - 8) if i > 1 else m.up(second, 8 - 4 * i)
        codes = m.either(m.both(m.down(first, 4 * i), 0x000F000F), m.both(upper, 0x0F000F00))
        (high, low), less = _met(m, i, places, *x), m.number(_LESS)
        a, b = m.dot(less, high, a, (True, True)), m.dot(less, low, b, (True, False))
        return m.dot(codes, high, a, (False, True)), m.dot(codes, low, b, (False, False))

    return body


def _whole(body: Any) -> Any:
    """Returns the body whose two sums are one, and nothing in the second's place."""

    def whole(m: Any, *registers: Any) -> tuple[Any, Any]:
        high, low = body(m, *registers)
        return m.plus(m.up(high, 8), low), m.both(low, 0)

    return whole


def _floats(i: int) -> Any:
    def body(m: Any, places: Any, first: Any, _: Any, second: Any, _2: Any, *more: Any) -> tuple[Any, Any]:
        *x, a, b = more
        upper, lower = _met(m, i, places, *x)
        low = _float_sum(m, m.choose(lower, upper, 0x5140), (m.up(first, 16), m.up(second, 16)), a)
        values = m.both(first, 0xFFFF0000), m.both(second, 0xFFFF0000)
        return low, _float_sum(m, m.choose(lower, upper, 0x7362), values, b)

    return body


def _float_sum(m: Any, x: Any, values: tuple[Any, Any], total: Any) -> Any:
    """Returns a sum with the products of a four's two values and inputs added; x are the inputs, in bfloat16."""
    return m.fma(m.both(x, 0xFFFF0000), values[1], m.fma(m.up(x, 16), values[0], total))


def _bits(x: Float[Array, "n"]) -> Int[Array, "n"]:
    """Returns the bits of inputs in bfloat16."""
    halves = jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.int16)
    return halves.astype(jnp.int32)
