"""Activations as kernels multiply with them: planes of every p-th input, and what codes' offset adds to products.

In one launch, a program a block of inputs: XLA would take three, one after the other, before each product.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from kernels.gpu.fields import WHOLE, fields
from kernels.gpu.weights.layout import OFFSET, Arranged, Pairs

LARGEST = 2.0**13
"""What the largest power of two of a block of x becomes in float16: no number overflows, and hardly any vanishes."""
PREPARES = "weights_x"
"""The name of the launch."""


class Operand(NamedTuple):
    """Rows of x as columns of products: planes (p, blocks * c, m).

    A block's products with codes, less its `sums` (blocks, m) and times its `factors` (blocks, m), are those of x.
    bfloat16 has neither: it is x itself. Numbers from 2^117 on have no factor in float32.
    """

    planes: Float[Array, "p n m"]
    sums: Float[Array, "blocks m"] | None
    factors: Float[Array, "blocks m"] | None


def operand(x: Float[Array, "m k"], matrix: Arranged, columns: int, interpret: bool, flipped: bool = False) -> Operand:
    """Returns x for a matrix, filled up with zeros to so many columns; `flipped`: float16 planes as (p, m, n)."""
    p, blocks, c = matrix.planes, matrix.blocks, matrix.columns
    if matrix.values.dtype == jnp.bfloat16:
        padded = jnp.pad(x.astype(jnp.bfloat16), ((0, columns - x.shape[0]), (0, p * blocks * c - x.shape[1])))
        return Operand(padded.reshape(columns, blocks * c, p).T, None, None)
    shape = jax.ShapeDtypeStruct
    row = pl.BlockSpec((None, columns), lambda block: (block, 0))
    planes, *sums, factors = pl.pallas_call(
        Prepare.of(matrix, flipped),
        grid=(blocks,),
        in_specs=[pl.BlockSpec(x.shape, lambda block: (0, 0))],
        out_specs=[_planes(p, c, columns, flipped), *([row] if _coded(matrix) else []), row],
        out_shape=[
            shape((p, columns, blocks * c) if flipped else (p, blocks * c, columns), jnp.float16),
            *[shape((blocks, columns), jnp.float32)] * (1 + _coded(matrix)),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=2, num_stages=1),
        interpret=interpret,
        name=PREPARES,
    )(x)
    return Operand(planes, sums[0] if sums else None, factors)


@dataclasses.dataclass(frozen=True)
class Prepare:
    """Prepares a block of x. `pairs` have one field for a block, dense weights one for a plane; without bits, none."""

    planes: int
    columns: int
    bits: int | None
    pairs: bool
    flipped: bool

    @classmethod
    def of(cls, matrix: Arranged, flipped: bool) -> "Prepare":
        bits = matrix.bits if _coded(matrix) else None
        return cls(matrix.planes, matrix.columns, bits, isinstance(matrix, Pairs), flipped)

    def __call__(self, x_ref: Any, planes_ref: Any, *refs: Any) -> None:
        *sums_ref, factors_ref = refs
        block = pl.program_id(0)
        parts = [self._plane(x_ref, block, i, factors_ref.shape[0]) for i in range(self.planes)]
        largest = parts[0]
        for part in parts[1:]:
            largest = jnp.maximum(jnp.abs(largest), jnp.abs(part))
        power = _power(jnp.max(jnp.abs(largest), axis=0))
        factors_ref[...] = power * (self._worth / LARGEST)
        sums = jnp.zeros_like(power)
        for i, part in enumerate(parts):
            unit = self._unit(block, i)
            rounded = (part * (LARGEST / power * unit)[None]).astype(jnp.float16)
            planes_ref[i, :, :] = rounded.T if self.flipped else rounded
            if self.bits:
                # From what was rounded: what is subtracted is large beside what is left.
                sums += jnp.sum(rounded.astype(jnp.float32), axis=0) * (OFFSET[self.bits] / self._worth / unit)
        if self.bits:
            sums_ref[0][...] = sums

    def _plane(self, x_ref: Any, block: Int[Array, ""], plane: int, rows: int) -> Float[Array, "c m"]:
        """Returns a block's inputs of one plane in float32; what is past x's ends is 0."""
        (m, k), shape = x_ref.shape, (self.columns, rows)
        row = jnp.broadcast_to(jnp.arange(rows)[None], shape)
        at = (block * self.columns + jnp.arange(self.columns)) * self.planes + plane
        at = jnp.broadcast_to(at[:, None], shape)
        found = x_ref[jnp.minimum(row, m - 1), jnp.minimum(at, k - 1)].astype(jnp.float32)
        return jnp.where((row < m) & (at < k), found, 0)

    @property
    def _worth(self) -> float:
        """What products are to be multiplied with, besides what x was divided by."""
        return WHOLE if self.bits else 1.0

    def _unit(self, block: Int[Array, ""], plane: int) -> Any:
        """Returns what a code is worth: 2^-pos of its field."""
        if not self.bits:
            return 1.0
        units = [0.5**field.place for field in fields(self.bits)[0]]
        if not self.pairs:
            return units[plane]
        # Positions repeat with every byte.
        return units[0] + (block % 2).astype(jnp.float32) * (units[1] - units[0])


def _planes(p: int, c: int, m: int, flipped: bool) -> pl.BlockSpec:
    """Returns the spec of a block's planes."""
    if flipped:
        return pl.BlockSpec((p, m, c), lambda block: (0, 0, block))
    return pl.BlockSpec((p, c, m), lambda block: (0, block, 0))


def _coded(matrix: Arranged) -> bool:
    return matrix.scales is not None


def _power(x: Float[Array, "m"]) -> Float[Array, "m"]:
    """Returns the power of two at or below numbers from 0 on; 2^-100 at least."""
    bits = jax.lax.bitcast_convert_type(jnp.maximum(x, 2.0**-100), jnp.int32) & 0x7F800000
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
