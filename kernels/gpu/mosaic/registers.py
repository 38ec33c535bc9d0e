"""What Pallas has no word for, register by register; and the same in jnp, for the interpreter."""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import FragmentedArray, utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, nvvm, vector
from jaxtyping import Array, Float, Int, Int16

from kernels.gpu.fields import HIGH_BYTES
from kernels.gpu.mosaic.layouts import MATRIX, ROWS, layout_of
from kernels.gpu.mosaic.plan import COLUMNS, LANES


def high_bytes(word: Int16[Array, "n w"], width: int, interpret: bool) -> Int16[Array, "n w"]:
    """Returns the words' high bytes as low ones; of fields 8 bits wide with nothing above.

    Else, compiled, something is in the high ones, which masks drop. A register has two words: a shift of each takes
    seven instructions, one of the register is one. With 8 bits a permutation of bytes does it, and the mask besides.
    """
    if interpret:
        return lax.shift_right_logical(word, jnp.int16(8))
    if width == 8:
        return _on_registers(_permute, word.shape, jnp.int16, MATRIX, word)
    return _on_registers(_shift, word.shape, jnp.int16, MATRIX, word)


def own_column(x: Float[Array, "n 8"], column: Int[Array, "n"], interpret: bool) -> Float[Array, "n"]:
    """Returns of each row the number in this column."""
    if interpret:
        return jnp.sum(jnp.where(jnp.arange(COLUMNS) == column[:, None], x, 0), axis=1)
    return _on_registers(_pick, column.shape, jnp.float32, ROWS, x, column)


def twice(x: Float[Array, "4 n"], interpret: bool) -> Float[Array, "n 8"]:
    """Returns each of the 4 rows as two columns."""
    if interpret:
        return jnp.repeat(x.T, COLUMNS // LANES, axis=1)
    return _on_registers(_twice, (x.shape[1], COLUMNS), x.dtype, MATRIX, x)


def add_product(acc: Any, a: Float[Array, "n k"], b: Any, interpret: bool) -> None:
    """Adds a @ b; the interpreter wants a in shared memory."""
    if not interpret:
        return plgpu.wgmma(acc, a, b)

    def stored(copy: Any) -> None:
        copy[...] = a
        plgpu.wgmma(acc, copy, b)

    return pl.run_scoped(stored, plgpu.SMEM(a.shape, a.dtype))


def _on_registers(function: Any, shape: tuple[int, ...], dtype: Any, layout: Any, *args: Array) -> Array:
    """Returns the array whose registers are the function of the arguments' registers, which lie in the same order."""
    layouts = tuple(layout_of(x) for x in args)

    @plgpu.inline_mgpu(arg_types=layouts, return_type=plgpu.ShapeDtypeStruct(shape, dtype, layout=layout))
    def call(_: Any, *args: Any) -> Any:
        registers = [function(*each) for each in zip(*(x.registers.flat for x in args), strict=True)]
        whole = np.empty(len(registers), object)
        whole[:] = registers
        kind = layout.to_mgpu()
        signed = True if jnp.issubdtype(dtype, jnp.integer) else None
        return FragmentedArray(_registers=whole.reshape(kind.registers_shape(shape)), _layout=kind, _is_signed=signed)

    return call(*args)


def _shift(pair: ir.Value) -> ir.Value:
    """Returns a pair of words shifted by 8 as if they were one number."""
    i32 = ir.IntegerType.get_signless(32)
    number = vector.bitcast(ir.VectorType.get((1,), i32), pair)
    eight = arith.constant(number.type, ir.DenseElementsAttr.get_splat(number.type, ir.IntegerAttr.get(i32, 8)))
    return vector.bitcast(pair.type, arith.shrui(number, eight))


def _permute(pair: ir.Value) -> ir.Value:
    """Returns the high bytes of a pair of words as low ones, and zeros above."""
    i32 = ir.IntegerType.get_signless(32)
    zeros = vector.bitcast(pair.type, vector.broadcast(ir.VectorType.get((1,), i32), utils.c(0, i32)))
    return utils.prmt(pair, zeros, utils.c(HIGH_BYTES, i32))


def _pick(pair: ir.Value, column: ir.Value) -> ir.Value:
    """Returns the number in this column of a row, of which each of 4 neighbouring lanes has a pair."""
    i32 = ir.IntegerType.get_signless(32)
    constant = functools.partial(utils.c, ty=i32)
    column = vector.extract(column, [], [0])
    first, second = (vector.extract(pair, [], [i]) for i in range(2))
    odd = arith.trunci(ir.IntegerType.get_signless(1), column)
    number = arith.select(odd, second, first)
    lane = arith.shrui(column, constant(1))
    # 0x1c03, operand c of PTX's shfl: lanes are counted within segments of 4.
    number = nvvm.shfl_sync(constant(0xFFFFFFFF), number, lane, constant(0x1C03), nvvm.ShflKind.idx)
    return vector.broadcast(ir.VectorType.get((1,), ir.F32Type.get()), number)


def _twice(number: ir.Value) -> ir.Value:
    """Returns the pair of a lane's columns that its group fills."""
    return vector.shuffle(number, number, [0, 0])
