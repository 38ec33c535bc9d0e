"""The call of the Triton kernel: arrays as it takes them, a program for every kv head, share and row."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from kernels.gpu.merge import Partials
from kernels.gpu.settled import MASKED, Codes, Part, Tail
from kernels.gpu.tiles import DEFAULT, Tiles
from kernels.gpu.triton.program import Program, Side
from kernels.gpu.triton.shapes import NARROWEST, Shapes, power

TAIL = 64
"""The most rows beside the codes that are taken at once."""


def partials(
    q: Float[Array, "b k m d"],
    part: Part,
    tail: Tail | None,
    scale: float,
    *,
    splits: int,
    tiles: Tiles = DEFAULT,
    interpret: bool = False,
) -> Partials:
    """Returns attention of m query rows a kv head over each share of a part, and over the tail's rows as one more.

    Args:
        q: queries, unscaled; row r is new token r % t of the tail's bias.
        scale: factor of the scores in log2 units.
        splits: shares of each row's own tokens, a program each.
    """
    b, k, m, d = q.shape
    shapes = Shapes.of(d, m, part, tiles.tokens, interpret)
    program = Program(shapes, _side(part.keys), _side(part.values), splits, _tail_rows(tail), scale)
    padded = jnp.pad(q.astype(jnp.float32), ((0, 0), (0, 0), (0, shapes.rows - m), (0, 0)))
    arrays = [padded, *_arrays(part.keys), *_arrays(part.values)]
    arrays += [] if tail is None else _tail_arrays(tail, program)
    row = (b, k, splits + (tail is not None), shapes.rows)
    results = [(*row[:3], shapes.channels, shapes.rows), row, row]
    call = pl.pallas_call(
        program,
        grid=(k, row[2], b),
        in_specs=[pl.BlockSpec((1,), lambda head, share, row: (row,)), *map(_whole, arrays)],
        out_specs=[_own(shape) for shape in results],
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in results],
        compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name=f"attend_k{part.keys.bits}_v{part.values.bits}",
    )
    out, top, total = call(part.counts.astype(jnp.int32), *arrays)
    return Partials(out.swapaxes(3, 4)[..., :m, :d], top[..., :m], total[..., :m])


def _side(codes: Codes) -> Side:
    return Side(codes.bits, codes.group, codes.run, codes.offset, len(_arrays(codes)))


def _arrays(codes: Codes) -> list[Array]:
    if codes.span is None or codes.zero is None:
        return list(codes.planes)
    # Triton's inline assembly knows no unsigned types.
    return [*(jax.lax.bitcast_convert_type(plane, jnp.int16) for plane in codes.planes), codes.span, codes.zero]


def _tail_rows(tail: Tail | None) -> int:
    return 0 if tail is None else min(max(power(tail.k.shape[2]), NARROWEST), TAIL)


def _tail_arrays(tail: Tail, program: Program) -> list[Array]:
    """Returns the tail's rows filled up to whole tiles, and its bias for every query row."""
    more = -tail.k.shape[2] % program.tail
    k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, more), (0, 0))) for x in (tail.k, tail.v))
    bias = jnp.pad(tail.bias, ((0, 0), (0, 0), (0, more)), constant_values=MASKED)
    each = jnp.arange(program.shapes.rows) % bias.shape[1]
    return [k, v, bias[:, None, each]]


def _whole(x: Array) -> pl.BlockSpec:
    """Returns the spec of one row's and kv head's whole array; where heads share one, that axis is 1 long."""
    many = x.shape[1] > 1
    return pl.BlockSpec((None, None, *x.shape[2:]), lambda head, share, row: (row, head if many else 0, 0, 0))


def _own(shape: tuple[int, ...]) -> pl.BlockSpec:
    inner = shape[3:]
    return pl.BlockSpec((None, None, None, *inner), lambda head, share, row: (row, head, share, *(0 for _ in inner)))
