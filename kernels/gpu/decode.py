"""Attention of a few queries by a kernel: from the op's call to parts of a row, and from their results to its own."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.gpu import device
from kernels.gpu.device import Device
from kernels.gpu.merge import Partials, merge
from kernels.gpu.mosaic import call as mosaic
from kernels.gpu.settled import Part, Tail, layout, unreadable
from kernels.gpu.tiles import MOSAIC, TRITON, Tiles, tiles_of
from kernels.gpu.triton import call as triton
from kernels.reference import Call
from kernels.stores import Packed

QUERIES = 8
"""The most queries a row; more are a prompt's, whose attention is a matter of arithmetic and not of reading a cache."""
ROWS = 8
"""The most query rows of a kv head that are taken at once: with 32 a kernel spills."""
MUCH = 2**18
"""Tokens of all rows and kv heads from which Mosaic's kernel is worth its further launches."""
CHANNELS = 256
"""The largest head_dim: beyond it a tile does not fit a multiprocessor's registers."""


def triton_unsupported(call: Call) -> str | None:
    """Returns why the Triton kernel cannot compute a call, or None."""
    return device.lacking() or _unsupported(call)


def with_triton(call: Call) -> Float[Array, "b h t d"]:
    """Returns the attention by the Triton kernel."""
    gpu = device.current()
    assert gpu is not None
    tiles = tiles_of(TRITON, gpu.kind)

    def run(rows: Array, part: Part, tail: Tail | None, scale: float) -> list[Partials]:
        splits = _splits(rows, part, tiles, gpu)
        return [triton.partials(rows, part, tail, scale, splits=splits, tiles=tiles, interpret=gpu.interpret)]

    return _over_parts(call, run)


def mosaic_unsupported(call: Call) -> str | None:
    """Returns why the Mosaic kernel cannot compute a call, or None."""
    reasons = [device.lacking((9, 0), only=True) or _unsupported(call)]

    def look(*arrays: Any) -> None:
        traced = call._replace(**dict(zip(call._fields, arrays, strict=False)))
        parts, tail = layout(traced)
        reasons.extend(mosaic.unsupported(_rows(traced, part)[:, :, : _at_once(call)], part, tail) for part in parts)

    if reasons == [None]:
        # Shapes decide, and only a trace knows them.
        jax.eval_shape(look, *call[: call._fields.index("turn")])
    return next((reason for reason in reasons if reason), None)


def mosaic_pays(call: Call) -> bool:
    """Returns whether the Mosaic kernel is known to be faster than Triton's, where it can.

    A lone query in 128k tokens of 32 heads, 4 bits, on an H100: 267 against 377 us with groups of 32, 242 against 245
    with groups of 128.
    """
    keys, values = call.keys, call.values
    if not isinstance(keys, Packed) or not isinstance(values, Packed):
        return False
    b, heads = keys.recent.shape[:2]
    alone = heads == call.q.shape[1] * call.q.shape[2]
    return alone and max(keys.quantizer.group, values.quantizer.group) < 128 and b * heads * keys.capacity >= MUCH


def with_mosaic(call: Call) -> Float[Array, "b h t d"]:
    """Returns the attention by the Mosaic kernel."""
    gpu = device.current()
    assert gpu is not None
    tiles = tiles_of(MOSAIC, gpu.kind)

    def run(rows: Array, part: Part, tail: Tail | None, scale: float) -> list[Partials]:
        splits = _splits(rows, part, tiles, gpu)
        own = mosaic.partials(rows, part, tail, scale, splits=splits, interpret=gpu.interpret)
        if part.latest is None:
            return [own]
        return [own, triton.partials(rows, part, None, scale, splits=0, interpret=gpu.interpret)]

    return _over_parts(call, run)


def _unsupported(call: Call) -> str | None:
    """Returns why neither kernel can compute a call, whatever the device, or None."""
    t, d = call.q.shape[2:]
    if t > QUERIES:
        return f"it takes up to {QUERIES} queries a row, got {t}"
    if t > 1 and call.append is None:
        return "several queries need their append"
    if d > CHANNELS:
        return f"it takes a head_dim of up to {CHANNELS}, got {d}"
    if call.turn is not None:
        return "keys kept before RoPE would have to be turned one by one"
    return unreadable(call.keys, call.values)


def _over_parts(call: Call, run: Callable[..., list[Partials]]) -> Float[Array, "b h t d"]:
    """Returns the attention over a layer's parts and what is beside their codes, merged."""
    parts, tail = layout(call)
    q = _rows(call, parts[0])
    # What is beside the codes goes with the first part.
    tails = [tail, *[None] * (len(parts) - 1)]
    scale = call.scale * math.log2(math.e)

    def attend(rows: Array) -> Float[Array, "b k m d"]:
        pairs = zip(parts, tails, strict=True)
        return merge([partials for part, own in pairs for partials in run(rows, part, own, scale)])

    step = _at_once(call)
    out = [attend(q[:, :, i : i + step]) for i in range(0, q.shape[2], step)]
    return jnp.concatenate(out, axis=2).reshape(call.q.shape).astype(call.q.dtype)


def _at_once(call: Call) -> int:
    """Returns how many query rows are taken at once: all new tokens of as many heads as fit."""
    t = call.q.shape[2]
    return max(ROWS // t, 1) * t


def _rows(call: Call, part: Part) -> Float[Array, "b k m d"]:
    """Returns the queries as rows of their kv heads, in float32."""
    b, _, _, d = call.q.shape
    return call.q.astype(jnp.float32).reshape(b, part.keys.planes[0].shape[1], -1, d)


def _splits(q: Array, part: Part, tiles: Tiles, gpu: Device) -> int:
    """Returns how many programs share a row: enough to fill the device, and each with a step of tokens at least."""
    wanted = -(-tiles.waves * gpu.cores // (q.shape[0] * q.shape[1]))
    step = (2 if part.values.bits == 16 else 4) * tiles.tokens
    return max(min(wanted, -(-part.capacity // step)), 1)
