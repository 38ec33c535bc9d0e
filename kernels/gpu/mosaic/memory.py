"""What a block reads and where it keeps it: arrays in global memory, and the buffers in shared memory."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from kernels.gpu.mosaic.plan import COLUMNS, TILE, Plan
from kernels.gpu.settled import Part

BOX = 256
"""The longest side of what TMA copies."""
SHARED_BYTES = 224 * 1024
"""Shared memory that a block may have, less what reductions and barriers take."""


class Inputs(NamedTuple):
    """In global memory; words as int16, batch and kv heads as one axis."""

    counts: Any
    q: Any
    keys: Any
    key_meta: Any
    values: Any
    value_meta: Any

    @classmethod
    def of(cls, plan: Plan, q: Float[Array, "b k m d"], part: Part, scale: float) -> "Inputs":
        key_meta, value_meta = (
            [lax.bitcast_convert_type(_flat(x), plan.metadata) for x in (codes.span, codes.zero)] for codes in part[:2]
        )
        short = plan.groups - key_meta[0].shape[1]
        # A lone query reads it transposed, which Mosaic can do with 16 bits, not with 8.
        kind = jnp.float16 if plan.alone else plan.metadata
        key_meta = [jnp.pad(x.astype(kind), ((0, 0), (0, short), (0, 0))) for x in key_meta]
        value_meta = [x.reshape(*x.shape[:2], -1, min(plan.step, BOX)) for x in value_meta]
        keys, values = ([lax.bitcast_convert_type(_flat(x), jnp.int16) for x in codes.planes] for codes in part[:2])
        return cls(part.counts, _queries(plan, q, scale), keys, key_meta, values, value_meta)


class Shared(NamedTuple):
    """In shared memory: what TMA fills, a stage while another one is read, and operands of products."""

    q: Any
    keys: Any
    key_meta: Any
    queries: Any
    offset: Any
    values: Any
    value_meta: Any
    weights: Any
    q_here: Any
    meta_here: Any
    here: Any

    @classmethod
    def of(cls, plan: Plan) -> "Shared":
        f16, i16, f32 = jnp.float16, jnp.int16, jnp.float32
        keys, values, stages, step, dim = plan.keys.planes, plan.values.planes, plan.stages, plan.step, plan.dim
        piece = min(step, BOX)
        sizes = [dim // plane.fields for plane in keys]
        groups = (plan.ahead, dim)
        key_meta = _swizzled(groups, f16, TILE) if plan.alone else plgpu.SMEM(groups, plan.metadata)
        value_meta = plgpu.SMEM((stages, plan.value_groups * plan.value_copies, step // piece, piece), plan.metadata)
        copies = sum(step // box(plan, size) for size in sizes) + len(values) + 2 * plan.value_copies
        return cls(
            plgpu.SMEM((len(keys) + 1, dim) + (() if plan.alone else (COLUMNS,)), f32),
            [_swizzled((stages, step, size), i16, size) for size in sizes],
            [key_meta] * 2,
            [_swizzled((plan.key_columns, dim), f16, plan.depth) for _ in keys],
            plgpu.SMEM((plan.key_columns,), f32),
            [_swizzled((stages, dim, step // plane.fields), i16, TILE) for plane in values],
            [value_meta] * 2,
            [_swizzled((stages, plan.value_columns, step), f16, plan.depth) for _ in values],
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
        )

    @property
    def size(self) -> int:
        """Bytes of shared memory, not counting some for barriers and for reductions over warps."""
        buffers = jax.tree.leaves(self[:-3], is_leaf=lambda x: hasattr(x, "shape"))
        return sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in buffers)


def fitted(plan: Plan) -> Plan:
    """Returns the plan with a single stage if there is no room for more."""
    return plan if Shared.of(plan).size <= SHARED_BYTES else plan._replace(stages=1)


def box(plan: Plan, size: int) -> int:
    """Returns how many tokens of so many key words each are copied at once."""
    return plan.step if size > COLUMNS else min(plan.step, BOX)


def _flat(x: Any) -> Array:
    return x.reshape(-1, *x.shape[2:])


def _queries(plan: Plan, q: Float[Array, "b k m d"], scale: float) -> Float[Array, "n p d *m"]:
    """Returns the scaled queries times the weights of each plane's fields, and plain."""
    weights = [np.repeat([p.weight(i) for i in range(p.fields)], plan.dim // p.fields) for p in plan.keys.planes]
    kinds = jnp.stack([_flat(q) * scale * np.asarray(w, np.float32) for w in (*weights, np.ones(plan.dim))], 1)
    if plan.alone:
        return kinds[:, :, 0]
    return jnp.pad(kinds, ((0, 0), (0, 0), (0, COLUMNS - q.shape[2]), (0, 0))).swapaxes(2, 3)


def _swizzled(shape: tuple[int, ...], dtype: Any, columns: int) -> Any:
    """Returns memory as TMA and wgmma want a matrix: in tiles of 8 rows and so many columns, plain if these are few."""
    size = columns * jnp.dtype(dtype).itemsize
    if size < 32:
        return plgpu.SMEM(shape, dtype)
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(size)))
