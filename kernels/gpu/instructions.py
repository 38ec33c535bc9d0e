"""Instructions on 32-bit registers that array operations have no words for: written as PTX, or done on arrays.

A function of `Ptx` or `Meaning` and registers says once what is to be done. An array of 16-bit numbers gives it a
register for each two of them, the first in its lower half; one of 32-bit numbers gives it two registers.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Int

from kernels.gpu.fields import inline

Body = Callable[..., Sequence[Any]]
"""Takes instructions and registers; returns the results' registers."""


def paired(body: Body, args: Sequence[Array], dtype: DTypeLike, results: int, interpret: bool) -> list[Array]:
    """Returns arrays, as many as `results`, of what a function makes of every two neighbours of the last axis.

    On a GPU these are what a thread holds side by side: neighbours where the arrays were loaded in pieces of two or
    more, any two of one row otherwise. There a function must make of each element what is its own.
    """
    if interpret:
        registers = [register for x in args for register in _registers(x)]
        return _arrays(list(body(Meaning(), *registers)), dtype, results)
    return [_assembled(body, args, dtype, result) for result in range(results)]


def _assembled(body: Body, args: Sequence[Array], dtype: DTypeLike, result: int) -> Array:
    """Returns one result: Pallas takes no more. The compiler sees what it does not need, and what two of them share."""
    each = 2 if jnp.dtype(dtype).itemsize == 4 else 1
    kinds = ["f" if x.dtype == jnp.float32 else "r" for x in args for _ in range(_width(x))]
    ptx = Ptx()
    found = body(ptx, *(f"${each + i}" for i in range(len(kinds))))[each * result :][:each]
    moves = [f"mov.b32 ${i}, {register};" for i, register in enumerate(found)]
    asm = f"{{ .reg .b32 r<{ptx.count}>; {' '.join([*ptx.lines, *moves])} }}"
    constraints = ",".join([*["=f" if dtype == jnp.float32 else "=r"] * each, *kinds])
    return inline(asm, list(args), dtype, constraints, 2)


class Ptx:
    """Writes instructions down. Registers are names, constants are numbers."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    @property
    def count(self) -> int:
        return len(self.lines)

    def number(self, bits: int) -> str:
        """A constant, for instructions that take none as they are."""
        return self._add("mov.b32", bits)

    def both(self, a: Any, b: Any) -> str:
        return self._add("and.b32", a, b)

    def either(self, a: Any, b: Any) -> str:
        return self._add("or.b32", a, b)

    def unlike(self, a: Any, b: Any) -> str:
        return self._add("xor.b32", a, b)

    def inverse(self, a: Any) -> str:
        return self._add("not.b32", a)

    def up(self, a: Any, bits: int) -> str:
        return self._add("shl.b32", a, bits)

    def down(self, a: Any, bits: int) -> str:
        return self._add("shr.b32", a, bits)

    def plus(self, a: Any, b: Any) -> str:
        return self._add("add.u32", a, b)

    def choose(self, a: Any, b: Any, places: Any) -> str:
        """The bytes of a (0 to 3) and b (4 to 7) that the lower four nibbles of `places` name."""
        return self._add("prmt.b32", a, b, places)

    def dot(self, a: Any, b: Any, c: Any, signed: tuple[bool, bool]) -> str:
        """c and the sum of the products of a's and b's bytes."""
        kinds = [".s32" if one else ".u32" for one in signed]
        return self._add(f"dp4a{kinds[0]}{kinds[1]}", a, b, c)

    def fma(self, a: Any, b: Any, c: Any) -> str:
        """a * b + c of float32, rounded once."""
        return self._add("fma.rn.f32", a, b, c)

    def _add(self, name: str, *args: Any) -> str:
        operands = [f"{arg & 0xFFFFFFFF:#x}" if isinstance(arg, int) else arg for arg in args]
        self.lines.append(f"{name} r{self.count}, {', '.join(operands)};")
        return f"r{self.count - 1}"


class Meaning:
    """Does the same on int32 arrays, slowly."""

    def number(self, bits: int) -> Array:
        return _int32(bits)

    def both(self, a: Any, b: Any) -> Array:
        return _int32(a) & _int32(b)

    def either(self, a: Any, b: Any) -> Array:
        return _int32(a) | _int32(b)

    def unlike(self, a: Any, b: Any) -> Array:
        return _int32(a) ^ _int32(b)

    def inverse(self, a: Any) -> Array:
        return ~a

    def up(self, a: Any, bits: int) -> Array:
        return _int32(a) << bits

    def down(self, a: Any, bits: int) -> Array:
        return jax.lax.shift_right_logical(_int32(a), jnp.full_like(a, bits))

    def plus(self, a: Any, b: Any) -> Array:
        return _int32(a) + _int32(b)

    def choose(self, a: Any, b: Any, places: Any) -> Array:
        found = jnp.int32(0)
        for i in range(4):
            place = places >> 4 * i & 7
            source = (b if place > 3 else a) if isinstance(place, int) else jnp.where(place > 3, _int32(b), _int32(a))
            byte = jax.lax.shift_right_logical(_int32(source), jnp.broadcast_to(place % 4 * 8, jnp.shape(source)))
            found |= (byte & 255) << 8 * i
        return found

    def dot(self, a: Any, b: Any, c: Any, signed: tuple[bool, bool]) -> Array:
        for i in range(4):
            one, other = (_byte(_int32(x), i, sign) for x, sign in zip((a, b), signed, strict=True))
            c = c + one * other
        return c

    def fma(self, a: Any, b: Any, c: Any) -> Array:
        """a * b + c of float32, rounded twice."""
        a, b, c = (jax.lax.bitcast_convert_type(_int32(x), jnp.float32) for x in (a, b, c))
        return jax.lax.bitcast_convert_type(a * b + c, jnp.int32)


def _int32(x: Any) -> Int[Array, "*any"]:
    return jnp.int32(x - (1 << 32) if x >> 31 else x) if isinstance(x, int) else x


def _byte(x: Int[Array, "*any"], i: int, signed: bool) -> Int[Array, "*any"]:
    return x << 24 - 8 * i >> 24 if signed else x >> 8 * i & 255


def _width(x: Array) -> int:
    return 2 if x.dtype.itemsize == 4 else 1


def _registers(x: Array) -> list[Int[Array, "*any n"]]:
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    if _width(x) == 1:
        return [jax.lax.bitcast_convert_type(pairs, jnp.int32)]
    return [jax.lax.bitcast_convert_type(pairs[..., i], jnp.int32) for i in range(2)]


def _arrays(registers: list[Array], dtype: DTypeLike, results: int) -> list[Array]:
    each, found = len(registers) // results, []
    for i in range(0, len(registers), each):
        halves = jnp.stack(registers[i : i + each], -1)
        made = jax.lax.bitcast_convert_type(halves[..., 0] if each == 1 else halves, dtype)
        found.append(made.reshape(*registers[i].shape[:-1], -1))
    return found
