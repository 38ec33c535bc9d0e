"""Weight matrices as GPU kernels read them: the canonical bytes in 16-bit words, cut into blocks of inputs.

A block is p planes of c columns: column w of plane i is its input p * w + i, so that a plane meets every p-th input of
x. A block is what shares a scale, and what one product of a plane sums over.

- Words (every weight kept): word w of a block holds the codes of its inputs from p * w on, p = 16 / bits.
- Pairs (2 of every 4 kept): p = 4. A tile is four blocks; bit 4 q + i of its mask's word w says whether input 4 w + i
  of its block q is kept. Of each four, the first values lie apart from the second: c of both for every block, or for
  as many blocks as a word has fields, field f being the f-th block's.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Num, UInt8

from kernels.weights import codes
from kernels.weights.formats import NM, Full, Matrix, as_they_were

TILE = 4
"""Blocks of a tile of pairs."""
OFFSET = {8: 128, 4: codes.OFFSET}
"""What codes are stored with added here: fields have no sign."""


class Arranged(Matrix):
    """A matrix for kernels: `scales` are (blocks, R), or (1, R) for one a row. Zeros fill up rows, blocks and tiles."""

    outputs_: int = struct.field(pytree_node=False)
    columns: int = struct.field(pytree_node=False)

    @property
    def outputs(self) -> int:
        return self.outputs_

    @property
    def planes(self) -> int:
        raise NotImplementedError

    @property
    def blocks(self) -> int:
        raise NotImplementedError

    @property
    def grouped(self) -> bool:
        """Whether each block has its own scales."""
        return self.scales is not None and self.scales.shape[0] > 1

    def canonical(self) -> Matrix:
        """Returns the matrix that this was made from, bit by bit."""
        raise NotImplementedError

    def _plain_scales(self) -> Float[Array, "r g"] | None:
        if self.scales is None:
            return None
        return self.scales.T[: self.outputs, : -(-self.inputs // self.group)]


class Words(Arranged):
    """Every weight kept, as codes: values (R, blocks * columns), int16."""

    @property
    def planes(self) -> int:
        return 16 // self.bits

    @property
    def blocks(self) -> int:
        return self.values.shape[1] // self.columns

    @property
    def kept(self) -> int:
        return self.inputs * self.outputs

    @property
    def kind(self) -> str:
        return "dense"

    def canonical(self) -> Full:
        held = jax.lax.bitcast_convert_type(self.values, jnp.uint8).reshape(self.values.shape[0], -1)
        held = signed(held[: self.outputs, : -(-self.inputs * self.bits // 8)], self.bits)
        return Full(held, self._plain_scales(), self.inputs, self.bits, self.group)

    def rows(self) -> Float[Array, "r k"]:
        return self.canonical().rows()


class Pairs(Arranged):
    """Two of every four kept: mask (R, tiles * columns), int16; values (R, tiles * 8 * columns / fields)."""

    mask: Int[Array, "r w"]
    order: Int[Array, "k"] | None = None

    @property
    def planes(self) -> int:
        return 4

    @property
    def blocks(self) -> int:
        return TILE * self.tiles

    @property
    def tiles(self) -> int:
        return self.mask.shape[1] // self.columns

    @property
    def fields(self) -> int:
        """How many values are one number of `values`."""
        return 1 if self.scales is None else 16 // self.bits

    @property
    def kept(self) -> int:
        return self.outputs * self.inputs // 2

    @property
    def kind(self) -> str:
        return "2:4"

    def canonical(self) -> NM:
        values = jnp.stack(self._values(), axis=-1)[: self.outputs, : self.inputs // 4]
        if self.scales is not None:
            values = values.astype(jnp.uint8)
        values = values[..., :1] | values[..., 1:] << 4 if self.bits == 4 else signed(values, self.bits)
        kept = self._kept().reshape(self.mask.shape[0], -1)[: self.outputs, : self.inputs]
        kept = jnp.pad(kept, ((0, 0), (0, -self.inputs % 64)))
        mask = jnp.packbits(kept, axis=1, bitorder="little")
        facts = (self.inputs, self.bits, self.group)
        pattern = {"n": 2, "m": 4, "order": self.order}
        return NM(values.reshape(self.outputs, -1), self._plain_scales(), *facts, mask=mask, **pattern)

    def rows(self) -> Float[Array, "r k"]:
        offset = OFFSET.get(self.bits, 0) if self.scales is not None else 0
        first, second = (values.astype(jnp.float32) - offset for values in self._values())
        a, b, c, d = jnp.moveaxis(self._kept(), -1, 0)
        # No gather: the second input has the second value if the first input has one; and so on.
        each = ((a, first), (b, jnp.where(a, second, first)), (c, jnp.where(d, first, second)), (d, second))
        rows = jnp.stack([jnp.where(kept, value, 0) for kept, value in each], axis=-1)
        rows = rows.reshape(self.mask.shape[0], -1)[: self.outputs, : self.inputs]
        scales = self._plain_scales()
        scaled = rows if scales is None else rows * codes.spread(scales, self.inputs, self.group)
        return as_they_were(scaled, self.order)

    def _kept(self) -> Bool[Array, "r fours 4"]:
        words = self.mask.reshape(-1, self.tiles, 1, self.columns, 1)
        at = TILE * jnp.arange(TILE, dtype=jnp.int16)[:, None, None] + jnp.arange(4, dtype=jnp.int16)
        return (words >> at & 1).astype(bool).reshape(self.mask.shape[0], -1, 4)

    def _values(self) -> Num[Array, "2 r fours"]:
        """Returns the first and the second value of each four: floats, or codes as they are stored."""
        held = self.values.reshape(-1, self.tiles, TILE // self.fields, 2, 1, self.columns)
        if self.scales is not None:
            at = self.bits * jnp.arange(self.fields, dtype=jnp.int16)[:, None]
            held = held >> at & (1 << self.bits) - 1
        return jnp.moveaxis(held, 3, 0).reshape(2, self.mask.shape[0], -1)


def unsigned(values: Num[Array, "*any"], bits: int) -> UInt8[Array, "*any"]:
    """Returns int8 codes with their offset; int4 codes have it, two a byte."""
    return values if bits == 4 else jax.lax.bitcast_convert_type(values, jnp.uint8) ^ jnp.uint8(OFFSET[8])


def signed(values: Num[Array, "*any"], bits: int) -> Num[Array, "*any"]:
    """Returns the reverse of `unsigned`; floats as they are."""
    return jax.lax.bitcast_convert_type(values ^ jnp.uint8(OFFSET[8]), jnp.int8) if bits == 8 else values
