"""The call of the Triton kernel: arrays as it takes them, a program for every kv head, share and row."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from kernels.gpu.merge import Partials
from kernels.gpu.settled import MASKED, Codes, Latest, Part, Tail
from kernels.gpu.tiles import DEFAULT, Tiles
from kernels.gpu.triton.program import Program, Side
from kernels.gpu.triton.shapes import NARROWEST, Shapes, power

TAIL = 64
"""The most rows beside the codes that are taken at once."""
LATEST = 32
"""The most of the latest tokens that are taken at once: their values' codes are decoded one by one, in registers."""


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
    """Returns attention of m query rows a kv head over each share of a part, and over its latest tokens and the tail.

    Args:
        q: queries, unscaled; row r is new token r % t of the tail's bias.
        scale: factor of the scores in log2 units.
        splits: shares of each row's own tokens, a program each.
    """
    m, d = q.shape[2:]
    shapes = Shapes.of(d, m, part, tiles.tokens, interpret)
    latest = part.latest
    rings = (False, False) if latest is None else (latest.keys is not None, latest.values is not None)
    sides = (_side(part.keys), _side(part.values))
    program = Program(shapes, *sides, splits, _latest_tokens(latest), rings, _tail_rows(tail), scale)
    padded = jnp.pad(q.astype(jnp.float32), ((0, 0), (0, 0), (0, shapes.rows - m), (0, 0)))
    arrays = [part.counts.astype(jnp.int32), padded, *_arrays(part.keys), *_arrays(part.values)]
    if latest is not None:
        exact = [ring for ring in (latest.keys, latest.values) if ring is not None]
        arrays += [latest.counts.astype(jnp.int32), *exact]
    if tail is not None:
        arrays += _tail_arrays(tail, program)
    out, top, total = _launch(arrays, program, tiles, f"attend_k{part.keys.bits}_v{part.values.bits}")
    return Partials(out.swapaxes(3, 4)[..., :m, :d], top[..., :m], total[..., :m])


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _launch(arrays: list[Array], program: Program, tiles: Tiles, name: str) -> list[Array]:
    """Returns the results of all programs. A program of its own, so that layers alike are traced and lowered once."""
    b, k = arrays[1].shape[:2]
    row = (b, k, program.programs, program.shapes.rows)
    results = [(*row[:3], program.shapes.channels, program.shapes.rows), row, row]
    call = pl.pallas_call(
        program,
        grid=(k, row[2], b),
        in_specs=[_count() if x.ndim == 1 else _whole(x) for x in arrays],
        out_specs=[_own(shape) for shape in results],
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in results],
        compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=program.shapes.interpret,
        name=name,
    )
    return call(*arrays)


def _side(codes: Codes) -> Side:
    return Side(codes.bits, codes.group, codes.run, codes.offset, len(_arrays(codes)))


def _arrays(codes: Codes) -> list[Array]:
    if codes.span is None or codes.zero is None:
        return list(codes.planes)
    # Triton's inline assembly knows no unsigned types.
    return [*(jax.lax.bitcast_convert_type(plane, jnp.int16) for plane in codes.planes), codes.span, codes.zero]


def _latest_tokens(latest: Latest | None) -> int:
    """Returns how many of the latest tokens are taken at once; 0: there are none."""
    if latest is None:
        return 0
    return min(max(power(latest.most), NARROWEST), LATEST)


def _tail_rows(tail: Tail | None) -> int:
    return 0 if tail is None else min(max(power(tail.k.shape[2]), NARROWEST), TAIL)


def _tail_arrays(tail: Tail, program: Program) -> list[Array]:
    """Returns the tail's rows filled up to whole tiles, and its bias for every query row."""
    more = -tail.k.shape[2] % program.tail
    k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, more), (0, 0))) for x in (tail.k, tail.v))
    bias = jnp.pad(tail.bias, ((0, 0), (0, 0), (0, more)), constant_values=MASKED)
    each = jnp.arange(program.shapes.rows) % bias.shape[1]
    return [k, v, bias[:, None, each]]


def _count() -> pl.BlockSpec:
    return pl.BlockSpec((1,), lambda head, share, row: (row,))


def _whole(x: Array) -> pl.BlockSpec:
    """Returns the spec of one row's and kv head's whole array; where heads share one, that axis is 1 long."""
    many = x.shape[1] > 1
    return pl.BlockSpec((None, None, *x.shape[2:]), lambda head, share, row: (row, head if many else 0, 0, 0))


def _own(shape: tuple[int, ...]) -> pl.BlockSpec:
    inner = shape[3:]
    return pl.BlockSpec((None, None, None, *inner), lambda head, share, row: (row, head, share, *(0 for _ in inner)))
