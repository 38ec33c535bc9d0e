"""One block of the grid: which tokens are its own, and how it multiplies words with what lies in shared memory.

A field of a word is masked out, one instruction for two words, right in the registers that wgmma reads: by itself it
is a number (see `gpu.fields`). What the numbers are multiplied with lies in shared memory: queries times spans of keys,
and p times spans of values. The zeros of groups are no part of products: they are one sum a column.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int, Int16

from kernels.gpu.mosaic.layouts import joined
from kernels.gpu.mosaic.memory import Inputs, Shared
from kernels.gpu.mosaic.plan import Plan, Plane
from kernels.gpu.mosaic.registers import add_product, high_bytes

Copy = tuple[Any, Any]
"""From where in global memory to where in shared memory."""


@dataclasses.dataclass(frozen=True)
class Block:
    """A split of a row's tokens, for one kv head, by one warpgroup.

    Args:
        at: the row and kv head.
        count: the row's tokens; the block's own are those of steps `first` to `last`, without the last.
    """

    plan: Plan
    given: Inputs
    shared: Shared
    at: Int[Array, ""]
    count: Int[Array, ""]
    first: Int[Array, ""]
    last: Int[Array, ""]

    @classmethod
    def of(cls, plan: Plan, given: Inputs, shared: Shared) -> "Block":
        split, head, row = (lax.axis_index(name) for name in ("split", "head", "row"))
        count = given.counts[row]
        steps = lax.div(count + plan.step - 1, plan.step)
        share = lax.div(steps + plan.splits - 1, plan.splits)
        first = jnp.minimum(split * share, steps)
        return cls(plan, given, shared, row * plan.heads + head, count, first, jnp.minimum(first + share, steps))

    def slot(self, step: Int[Array, ""]) -> Int[Array, ""]:
        """Returns the stage of shared memory that a step's words lie in."""
        return lax.rem(step - self.first, self.plan.stages)

    def summed(self, shape: tuple[int, int], add: Callable[[Any], None]) -> Float[Array, "n m"]:
        """Returns what `add` adds to an accumulator."""

        def run(acc: Any) -> Array:
            add(acc)
            return acc[...]

        return pl.run_scoped(run, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))

    def multiply(self, acc: Any, plane: Plane, word: Int16[Array, "n w"], operand: Any, stride: int) -> None:
        """Adds the products of a plane's fields; field i of word k meets column i * stride + k of the operand."""
        interpret, depth, width = self.plan.interpret, self.plan.depth, min(self.plan.depth, word.shape[1])
        halves = word, high_bytes(word, plane.width, interpret)
        for k in range(0, word.shape[1], width):
            for i in range(0, plane.fields, depth // width):
                fields = range(i, i + depth // width)
                cut = [halves[j * plane.width // 8][:, k : k + width] for j in fields]
                numbers = [plane.read(x, j) for x, j in zip(cut, fields, strict=True)]
                add_product(acc, joined(numbers, 1), operand.at[:, pl.ds(i * stride + k, depth)].T, interpret)
                plgpu.wgmma_wait(1)
