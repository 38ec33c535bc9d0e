"""The product with every weight kept in Pallas Mosaic GPU, for Hopper: TMA brings words and x, wgmma takes fields."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from kernels.gpu import device
from kernels.gpu.mosaic.layouts import COLS, MATRIX, ROWS, across, down, full, load
from kernels.gpu.mosaic.plan import COLUMNS, TILE, Plane
from kernels.gpu.mosaic.registers import add_product, high_bytes
from kernels.gpu.weights import matmul
from kernels.gpu.weights.layout import Words
from kernels.gpu.weights.operand import operand
from kernels.weights.formats import Matrix

WORDS = 64
"""Words of a row that a step takes: 128 bytes, as TMA likes them best."""
STAGES = 4
"""Steps whose words are in shared memory or on their way."""
WAVES = 4
"""Blocks of the grid that a multiprocessor should be given."""
_INTERPRETER: Any = getattr(plgpu, "InterpretGPUParams", None)


class Inputs(NamedTuple):
    """In global memory; x (p, m, n). Without groups there are no scales."""

    x: Any
    words: Any
    sums: Any
    factors: Any
    scales: Any


class Shared(NamedTuple):
    """In shared memory, a stage for each step; `here` says what has come."""

    x: Any
    words: Any
    sums: Any
    factors: Any
    scales: Any
    here: Any


@dataclasses.dataclass(frozen=True)
class Block:
    """A block of the grid: 64 or 128 rows of the matrix, and a share of the inputs."""

    given: Inputs
    shared: Shared
    bits: int
    columns: int
    splits: int
    interpret: bool

    @property
    def rows(self) -> int:
        return self.shared.words.shape[1]

    def run(self, out: Any) -> None:
        """Writes what the block's share of the inputs adds to its rows' results."""
        steps = self.given.words.shape[1] // WORDS
        share = -(-steps // self.splits)
        first = lax.axis_index("split") * share
        last = jnp.minimum(first + share, steps)
        for i in range(STAGES):
            pl.when(first + i < last)(functools.partial(self._fetch, first + i, first))

        def step(at: Int[Array, ""], total: Array) -> Array:
            slot = lax.rem(at - first, STAGES)
            plgpu.barrier_wait(self.shared.here.at[slot])
            total = self._added(total, slot)
            pl.when(at + STAGES < last)(functools.partial(self._refill, at + STAGES, first))
            return total

        total = lax.fori_loop(first, last, step, full(0.0, (self.rows, COLUMNS), MATRIX))
        out.at[lax.axis_index("split"), self._own][...] = total

    @property
    def _own(self) -> Any:
        """The block's rows of the matrix."""
        return pl.ds(lax.axis_index("row") * self.rows, self.rows)

    def _refill(self, step: Int[Array, ""], first: Int[Array, ""]) -> None:
        plgpu.commit_smem()  # What this step has read is not to be overtaken by the copy.
        self._fetch(step, first)

    def _fetch(self, step: Int[Array, ""], first: Int[Array, ""]) -> None:
        given, shared, slot = self.given, self.shared, lax.rem(step - first, STAGES)
        words, blocks = pl.ds(step * WORDS, WORDS), pl.ds(step * (WORDS // self.columns), WORDS // self.columns)
        copies = [(given.words.at[self._own, words], shared.words), (given.x.at[:, :, words], shared.x)]
        copies += [(given.sums.at[blocks], shared.sums), (given.factors.at[blocks], shared.factors)]
        if given.scales is not None:
            copies.append((given.scales.at[blocks, self._own], shared.scales))
        for source, target in copies:
            plgpu.copy_gmem_to_smem(source, target.at[slot], shared.here.at[slot])

    def _added(self, total: Float[Array, "r m"], slot: Int[Array, ""]) -> Float[Array, "r m"]:
        """Returns the sum with a stage's products added."""
        for block in range(WORDS // self.columns):
            sums, factors = (load(x.at[slot, block], COLS) for x in (self.shared.sums, self.shared.factors))
            own = (self._product(slot, block) - down(sums, self.rows)) * down(factors, self.rows)
            if self.given.scales is not None:
                own *= across(load(self.shared.scales.at[slot, block], ROWS).astype(jnp.float32))
            total += own
        return total

    def _product(self, slot: Int[Array, ""], block: int) -> Float[Array, "r m"]:
        """Returns the products of a block of a stage."""

        def run(acc: Any) -> Array:
            self._multiply(acc, slot, pl.ds(block * self.columns, self.columns))
            return acc[...]

        return pl.run_scoped(run, plgpu.WGMMAAccumulatorRef((self.rows, COLUMNS), jnp.float32))

    def _multiply(self, acc: Any, slot: Int[Array, ""], words: Any) -> None:
        plane = Plane(self.bits, 0)
        word = load(self.shared.words.at[slot, :, words], MATRIX)
        halves = word, high_bytes(word, self.bits, self.interpret)
        for field in range(plane.fields):
            numbers = plane.read(halves[field * self.bits // 8], field)
            add_product(acc, numbers, self.shared.x.at[slot, field, :, words].T, self.interpret)
            plgpu.wgmma_wait(1)


def run(x: Float[Array, "m k"], matrix: Matrix) -> Float[Array, "m r"]:
    """Returns x @ matrix by the kernel."""
    gpu = device.current()
    assert gpu is not None
    assert isinstance(matrix, Words)
    rows, words = matrix.values.shape
    steps = words // WORDS
    wanted = min(-(-WAVES * gpu.cores * rows_of(matrix) // rows), max(steps // STAGES, 1))
    return product(x, matrix, -(-steps // -(-steps // wanted)), gpu.interpret)


def unsupported(x: Float[Array, "m k"], matrix: Matrix) -> str | None:
    """Returns why the kernel cannot compute a product, or None."""
    if reason := device.lacking((9, 0), only=True):
        return reason
    if _INTERPRETER is None:
        return f"it needs jax 0.11, this is {jax.__version__}"
    if reason := matmul.unsupported(x, matrix):
        return reason
    if not isinstance(matrix, Words):
        return f"it reads dense weights, not {matrix.kind}"
    if x.shape[0] > COLUMNS:
        return f"it takes up to {COLUMNS} rows of x, got {x.shape[0]}"
    words = matrix.values.shape[1]
    return f"{words} words of a row are no multiple of {WORDS}" if words % WORDS else None


def product(x: Float[Array, "m k"], matrix: Words, splits: int, interpret: bool = False) -> Float[Array, "m r"]:
    """Returns x @ matrix in x's dtype; x is rounded to float16."""
    own, rows = operand(x, matrix, COLUMNS, interpret, True), matrix.values.shape[0]
    read = (own.planes, matrix.values, own.sums, own.factors, matrix.scales if matrix.grouped else None)

    def body(given: Inputs, out: Any, shared: Shared) -> None:
        Block(given, shared, matrix.bits, matrix.columns, splits, interpret).run(out)

    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((splits, rows, COLUMNS), jnp.float32),
        grid=(rows // rows_of(matrix), splits),
        grid_names=("row", "split"),
        scratch_types=[_shared(matrix)],
        kernel_name=f"weights_dense_{matrix.bits}",
        interpret=_INTERPRETER(detect_races=True) if interpret else None,
    )
    y = jnp.sum(kernel(Inputs(*read)), axis=0)
    if not matrix.grouped:
        assert matrix.scales is not None
        y *= matrix.scales[0, :, None].astype(jnp.float32)
    m = x.shape[0]
    return y[: matrix.outputs, :m].T.astype(x.dtype)


def rows_of(matrix: Words) -> int:
    """Returns how many rows of a matrix a block takes: two wgmma's, or one's."""
    return 2 * TILE if matrix.values.shape[0] % (2 * TILE) == 0 else TILE


def _shared(matrix: Words) -> Shared:
    columns, blocks = matrix.columns, WORDS // matrix.columns
    swizzled = (plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(2 * columns))
    each = plgpu.SMEM((STAGES, blocks, COLUMNS), jnp.float32)
    return Shared(
        plgpu.SMEM((STAGES, matrix.planes, COLUMNS, WORDS), jnp.float16, transforms=swizzled),
        plgpu.SMEM((STAGES, rows_of(matrix), WORDS), jnp.int16, transforms=swizzled),
        each,
        each,
        plgpu.SMEM((STAGES, blocks, rows_of(matrix)), jnp.bfloat16) if matrix.grouped else None,
        plgpu.Barrier(num_arrivals=5 if matrix.grouped else 4, num_barriers=STAGES),
    )
