"""Extents that are known when a kernel is compiled, and how tiles are loaded and their columns chosen.

Nothing is loaded out of bounds: an index past an end is taken back to what is there, and what was loaded twice is
multiplied with zero or masked among the scores.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from kernels.gpu.settled import Part

NARROWEST = 16
"""The least extent that a matrix product may sum over."""
COLUMNS = 8
"""The columns of the narrowest matrix product."""


def power(n: int) -> int:
    """Returns the next power of two: all extents of arrays in Triton are."""
    return 1 << (n - 1).bit_length()


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Extents of one program.

    Args:
        d, channels: channels, and their extent in a tile.
        rows: query rows of a kv head: one, or a power of two that fills the narrowest matrix product.
        tokens, lanes: rows of a tile, and these of them that hold tokens; fewer where words lie in short runs.
        capacity: tokens that there is memory for.
        interpret: whether inline assembly gives way to its meaning.
    """

    d: int
    rows: int
    tokens: int
    lanes: int
    capacity: int
    interpret: bool

    @classmethod
    def of(cls, d: int, m: int, part: Part, tokens: int, interpret: bool) -> "Shapes":
        lanes = min(part.values.run, tokens) if part.values.bits < 16 else tokens
        rows = 1 if m == 1 else max(power(m), COLUMNS)
        return cls(d, rows, max(lanes, NARROWEST), lanes, part.capacity, interpret)

    @property
    def channels(self) -> int:
        return max(power(self.d), NARROWEST)

    @property
    def each(self) -> tuple[int, ...]:
        """The axis of query rows, which a single one does not have."""
        return (self.rows,) if self.rows > 1 else ()

    def wide(self, blocks: int) -> int:
        """Returns the columns of a matrix product that holds so many blocks of query rows."""
        return max(blocks * self.rows, COLUMNS)

    def row_index(self, start: Int[Array, ""], offset: int, exact: bool) -> Any:
        """Returns where a tile's tokens lie as rows; `exact` if tiles end where the tokens do."""
        if exact and self.lanes == self.tokens:
            return pl.ds(start + offset, self.tokens)
        return jnp.minimum(start + jnp.arange(self.tokens), self.capacity - 1) + offset

    def lane_index(self, start: Int[Array, ""]) -> Any:
        """Returns where a tile's tokens, or their words, lie along an axis that whole blocks fill."""
        return run_index(pl.multiple_of(start, self.lanes), self.lanes, self.tokens)


def run_index(start: Any, there: int, wide: int) -> Any:
    """Returns `wide` indices from `start` on, of which only the first `there` are different."""
    # The remainder of a range is seen to be contiguous where a minimum is not: loads stay wide.
    return pl.ds(start, wide) if there == wide else start + jnp.arange(wide) % there


def load(ref: Any, rows: Any, columns: Any) -> Array:
    """Returns the elements of a 2-d array at the crossings of two indices, each a slice or an array."""
    if isinstance(rows, pl.Slice) and isinstance(columns, pl.Slice):
        return ref[rows, columns]
    rows, columns = array(rows)[:, None], array(columns)[None]
    shape = (rows.shape[0], columns.shape[1])
    return ref[jnp.broadcast_to(rows, shape), jnp.broadcast_to(columns, shape)]


def dot(a: Float[Array, "n k"], b: Float[Array, "k m"]) -> Float[Array, "n m"]:
    """Returns the product, summed in float32."""
    return jax.lax.dot(a, b, preferred_element_type=jnp.float32)


def accumulate(total: Float[Array, "n m"], a: Float[Array, "n k"], b: Float[Array, "k m"]) -> Float[Array, "n m"]:
    """Returns a sum with a product added, which matrix units do in one: what is far below the largest is cut off."""
    return total + dot(a, b)


def pick(x: Float[Array, "n blocks*rows"], block: Any, rows: int) -> Float[Array, "n *rows"]:
    """Returns, for each row of x, the columns of one block of columns: an index, or an index a row.

    A single query row has no axis: one of length 1 would cost the compiler its layouts.
    """
    n, blocks = x.shape[0], x.shape[1] // rows
    if blocks == 1:
        return x
    mine = jnp.arange(blocks)[None] == jnp.broadcast_to(block, (n,))[:, None]
    if rows == 1:
        return jnp.sum(jnp.where(mine, x, 0), axis=1)
    return jnp.sum(jnp.where(mine[:, :, None], x.reshape(n, blocks, rows), 0), axis=1)


def columns(x: Float[Array, "n *rows"], wide: int) -> Float[Array, "n wide"]:
    """Returns x as columns of a matrix product; those of a single query row are all the same."""
    return jnp.broadcast_to(x[:, None], (x.shape[0], wide)) if x.ndim == 1 else x


def outer(x: Float[Array, "n *blocks"], y: Float[Array, "n *rows"]) -> Float[Array, "n *columns"]:
    """Returns the products of each row of x with that of y, block by block."""
    if x.ndim == 1:
        return (x if y.ndim == 1 else x[:, None]) * y
    return x * y[:, None] if y.ndim == 1 else (x[:, :, None] * y[:, None]).reshape(y.shape[0], -1)


def over(x: Float[Array, "*rows"], n: int) -> Float[Array, "n *rows"]:
    """Returns x once for each of n rows."""
    return jnp.broadcast_to(x[None] if x.ndim else x, (n, *x.shape))


def array(index: Any) -> Int[Array, "n"]:
    """Returns an index as an array."""
    return index.start + jnp.arange(index.size) if isinstance(index, pl.Slice) else index
