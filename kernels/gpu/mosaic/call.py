"""The call of the Mosaic kernel: what it takes, a block of the grid for every share, kv head and row, and the tail.

A warpgroup takes a share of one row's tokens for one kv head. TMA brings words of keys and values for a step's tokens
while the step before is computed; the step is as long as a block of value words. Packed codes become operands of wgmma
in registers.

A wgmma has at least 8 columns. Several query rows fill them up; a lone one leaves them to 8 groups of keys, and to all
groups of values, and each token (channel) picks its group's column.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from kernels import words
from kernels.gpu.merge import Partials
from kernels.gpu.mosaic.memory import SHARED_BYTES, Inputs, Shared, fitted
from kernels.gpu.mosaic.plan import COLUMNS, TILE, Plan
from kernels.gpu.mosaic.program import Program
from kernels.gpu.settled import MASKED, Part, Tail

_INTERPRETER: Any = getattr(plgpu, "InterpretGPUParams", None)
"""It came with jax 0.11, as did what the kernel needs on a GPU."""


def unsupported(q: Float[Array, "b k m d"], part: Part, tail: Tail | None) -> str | None:
    """Returns why this kernel cannot take these arguments, or None; whether there is a tail does not matter."""
    if _INTERPRETER is None:
        return f"it needs jax 0.11, this is {jax.__version__}"
    m, d = q.shape[2:]
    if m > COLUMNS:
        return f"{m} query rows a kv head, at most {COLUMNS} fit in a product"
    if d not in (64, 128):
        return f"head_dim {d}, not 64 or 128"
    if reason := _unsupported_sides(m, d, part):
        return reason
    plan = Plan.of(q, part.keys, part.values, splits=1, interpret=False)
    if d < COLUMNS * max(plane.fields for plane in plan.keys.planes):
        return f"keys in {part.keys.bits} bits: head_dim {d} takes fewer than {COLUMNS} words of a plane"
    size = Shared.of(fitted(plan)).size
    return f"{size} bytes of shared memory, a block has {SHARED_BYTES}" if size > SHARED_BYTES else None


def partials(
    q: Float[Array, "b k m d"], part: Part, tail: Tail | None, scale: float, *, splits: int, interpret: bool = False
) -> Partials:
    """Returns attention of m query rows a kv head over each share of a part, and over the tail's rows as one more.

    Args:
        q: queries, unscaled; row r is new token r % t of the tail's bias.
        scale: factor of the scores in log2 units.
        splits: shares of each row's own tokens, a block of the grid each.
        interpret: whether to run without a GPU, in Mosaic's interpreter, which looks for races.
    """
    plan = fitted(Plan.of(q, part.keys, part.values, splits, interpret))
    name = f"attend_k{part.keys.bits}_v{part.values.bits}"
    own = _launch(Inputs.of(plan, q, part, scale), plan, q.shape, name)
    if tail is None:
        return own
    return Partials(*(jnp.concatenate(pair, axis=2) for pair in zip(own, _exact(q, tail, scale), strict=True)))


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _launch(inputs: Inputs, plan: Plan, shape: tuple[int, int, int, int], name: str) -> Partials:
    """Returns the results of all blocks. A program of its own, so that layers alike are traced and lowered once."""
    (b, k, m, d), columns = shape, () if plan.alone else (COLUMNS,)
    shapes = ((d, *columns), columns, columns)
    kernel = plgpu.kernel(
        lambda given, out, top, total, shared: Program.of(plan, given, shared).run(out, top, total),
        out_type=[jax.ShapeDtypeStruct((b * k, plan.splits, *shape), jnp.float32) for shape in shapes],
        grid=(plan.splits, k, b),
        grid_names=("split", "head", "row"),
        scratch_types=[Shared.of(plan)],
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name=name,
        interpret=_INTERPRETER(detect_races=True) if plan.interpret else None,
    )
    results = kernel(inputs)
    rows = (
        x.reshape(b, k, plan.splits, *shape[: -1 if columns else None], -1)
        for x, shape in zip(results, shapes, strict=True)
    )
    out, top, total = (x[..., :m] for x in rows)
    return Partials(out.swapaxes(3, 4), top, total)


def _unsupported_sides(m: int, d: int, part: Part) -> str | None:
    keys, values = part.keys, part.values
    for side, codes in (("keys", keys), ("values", values)):
        if codes.bits not in words.PLANES:
            return f"{side} in {codes.bits} bits are no packed words"
        if codes.group not in (32, 64, 128) or (side == "values" and codes.group > d):
            return f"{side} in groups of {codes.group}"
    assert keys.span is not None
    assert values.span is not None
    if keys.span.dtype != values.span.dtype:
        return f"metadata of keys in {keys.span.dtype}, of values in {values.span.dtype}"
    if len(words.PLANES[values.bits]) > 1:
        return f"values in {values.bits} bits: two planes need more registers than there are"
    if m > 1 and d // values.group > 2:
        return f"several query rows with {d // values.group} groups of values need more registers than there are"
    if m > 1 and values.bits == 2 and len(words.PLANES[keys.bits]) > 1:
        return f"several query rows with keys in {keys.bits} bits and values in 2 need more registers than there are"
    return f"runs of {values.run} words, not {TILE}" if values.run != TILE else None


def _exact(q: Float[Array, "b k m d"], tail: Tail, scale: float) -> Partials:
    """Returns attention over a few exact rows, left to XLA: they are not what decoding waits for."""
    k, v = (x.astype(jnp.float32) for x in tail[:2])
    dot = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
    seen = tail.bias[:, jnp.arange(q.shape[2]) % tail.bias.shape[1]][:, None]
    scores = jnp.maximum(dot("bkmd,bknd->bkmn", q, k) * scale + seen, MASKED)
    top = scores.max(-1, keepdims=True)
    p = jnp.where(scores > MASKED, jnp.exp2(scores - top), 0)
    return Partials(*(x[:, :, None] for x in (dot("bkmn,bknd->bkmd", p, v), top[..., 0], p.sum(-1))))
