"""The ways to keep a weight matrix, as pytrees: Full, NM and Bitmap, and a Table of embeddings. Laws: the package."""

import functools

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int, UInt8

from kernels.weights import codes, masks


class Matrix(struct.PyTreeNode):
    """What the formats have in common: kept values by output row, their scales if they are codes, and static facts.

    `bits` are a value's: 32 or 16 of a float, 8 or 4 of a code. `group` inputs share a scale; without scales it says
    nothing. `x @ matrix` is `kernels.weights.matmul.matmul(x, matrix)`.
    """

    values: Array
    scales: Float[Array, "r g"] | None
    inputs: int = struct.field(pytree_node=False)
    bits: int = struct.field(pytree_node=False)
    group: int = struct.field(pytree_node=False)
    __array_ufunc__ = None  # NumPy's arrays leave products to __rmatmul__, too

    @property
    def order(self) -> Int[Array, "k"] | None:
        """The inputs as the rows have them, where that is an order of their own."""
        return None

    @property
    def outputs(self) -> int:
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, int]:
        """(inputs, outputs), as of a plain kernel."""
        return self.inputs, self.outputs

    @property
    def ndim(self) -> int:
        return 2

    @property
    def nbytes(self) -> int:
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    @property
    def kept(self) -> int:
        """How many weights are stored, zeros among them too."""
        raise NotImplementedError

    @property
    def kind(self) -> str:
        """ "dense", "bitmap" or such as "2:4", as in `WeightFormat`."""
        raise NotImplementedError

    def rows(self) -> Float[Array, "r k"]:
        """Returns all weights in float32, zeros in place."""
        raise NotImplementedError

    def dense(self) -> Float[Array, "k r"]:
        """Returns the matrix as a plain kernel, in its values' dtype; codes become float32."""
        rows = self.rows().T
        return rows if self.scales is not None else rows.astype(self.values.dtype)

    def __rmatmul__(self, x: Float[Array, "*batch k"]) -> Float[Array, "*batch r"]:
        # Imported here, for the op's backends are made for these classes.
        from kernels.weights.matmul import matmul

        return matmul(x, self)

    def _scaled(self, rows: Float[Array, "r k"]) -> Float[Array, "r k"]:
        """Returns rows of codes times their scales; floats as they are."""
        if self.scales is None:
            return rows
        return rows * codes.spread(self.scales, self.inputs, self.group)


class Full(Matrix):
    """Every weight kept: values (R, K); of int4 (R, ceil(K / 2))."""

    @property
    def outputs(self) -> int:
        return self.values.shape[0]

    @property
    def kept(self) -> int:
        return self.inputs * self.outputs

    @property
    def kind(self) -> str:
        return "dense"

    def rows(self) -> Float[Array, "r k"]:
        return self._scaled(codes.numbers(self.values, self.bits, self.inputs))


class Table(Full):
    """Embeddings of a vocabulary: shape (outputs, inputs), a row a token; its transpose is the matrix of the logits.

    `dtype` is what rows come out in.
    """

    dtype: str = struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, int]:
        return self.outputs, self.inputs

    @property
    def kind(self) -> str:
        return "table"

    @property
    def T(self) -> Full:
        """The matrix from `inputs` features to `outputs` tokens."""
        return Full(self.values, self.scales, self.inputs, self.bits, self.group)

    def dense(self) -> Float[Array, "v e"]:
        return self.rows().astype(self.dtype)

    def take(self, tokens: Int[Array, "*any"], axis: int = 0, mode: str = "clip") -> Float[Array, "*any e"]:
        """Returns tokens' rows, as the method of arrays does."""
        at = functools.partial(jnp.take, indices=tokens, axis=axis, mode=mode)
        scales = None if self.scales is None else at(self.scales).reshape(-1, self.scales.shape[1])
        chosen = Full(at(self.values).reshape(-1, self.values.shape[1]), scales, self.inputs, self.bits, self.group)
        return chosen.rows().astype(self.dtype).reshape(*tokens.shape, self.inputs)


class NM(Matrix):
    """n of every m consecutive inputs kept: mask (R, B), values (R, P), P = K / m * n; of int4 (R, ceil(P / 2)).

    With an order, of every m inputs that follow each other in it.
    """

    mask: UInt8[Array, "r b"]
    n: int = struct.field(pytree_node=False)
    m: int = struct.field(pytree_node=False)
    order: Int[Array, "k"] | None = None

    @property
    def outputs(self) -> int:
        return self.mask.shape[0]

    @property
    def kept(self) -> int:
        return self.outputs * self.per_row

    @property
    def per_row(self) -> int:
        """Values of a row."""
        return self.inputs // self.m * self.n

    @property
    def kind(self) -> str:
        return f"{self.n}:{self.m}"

    def rows(self) -> Float[Array, "r k"]:
        kept = masks.unpacked(self.mask, self.inputs)
        values = codes.numbers(self.values, self.bits, self.per_row)
        at = jnp.maximum(jnp.cumsum(kept, axis=1, dtype=jnp.int32) - 1, 0)
        return as_they_were(self._scaled(jnp.where(kept, jnp.take_along_axis(values, at, axis=1), 0)), self.order)


class Bitmap(Matrix):
    """Any weights kept: mask (R, B), values (nnz,) in a single run, row r's from starts[r] to starts[r + 1].

    Of int4 the values are bytes of two, rows begin at whole ones, and `starts` counts codes.
    """

    mask: UInt8[Array, "r b"]
    starts: Int[Array, "r1"]

    @property
    def outputs(self) -> int:
        return self.mask.shape[0]

    @property
    def kept(self) -> int:
        return self.values.shape[0] * (2 if self.bits == 4 else 1)

    @property
    def kind(self) -> str:
        return "bitmap"

    def rows(self) -> Float[Array, "r k"]:
        kept = masks.unpacked(self.mask, self.inputs)
        values = codes.numbers(self.values, self.bits, self.kept)
        if not self.kept:
            return jnp.zeros(kept.shape, jnp.float32)
        at = self.starts[:-1, None] + jnp.cumsum(kept, axis=1, dtype=jnp.int32) - 1
        return self._scaled(jnp.where(kept, jnp.take(values, at, mode="clip"), 0))


def as_they_were(rows: Float[Array, "r k"], order: Int[Array, "k"] | None) -> Float[Array, "r k"]:
    """Returns rows whose inputs lie in an order with each input at its own place again."""
    return rows if order is None else jnp.zeros_like(rows).at[:, order].set(rows, unique_indices=True)
