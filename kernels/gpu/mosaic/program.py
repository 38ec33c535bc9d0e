"""The program of a block: online softmax over its share of a row, while TMA brings the next steps' words."""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from kernels.gpu.mosaic.block import Block
from kernels.gpu.mosaic.keys import Keys
from kernels.gpu.mosaic.layouts import COLS, MATRIX, ROWS, down, folded, full, scaled
from kernels.gpu.mosaic.memory import Inputs, Shared
from kernels.gpu.mosaic.plan import COLUMNS, TILE, Plan
from kernels.gpu.mosaic.values import Values
from kernels.gpu.settled import MASKED

State = tuple[Float[Array, "*m"], Float[Array, "n *m"], Float[Array, "d columns"], list[Array]]
"""The largest score so far, the sums of weights, a row a token of a tile, and the sums of values."""


@dataclasses.dataclass(frozen=True)
class Program:
    """A block with its keys and values."""

    block: Block
    keys: Keys
    values: Values

    @classmethod
    def of(cls, plan: Plan, given: Inputs, shared: Shared) -> "Program":
        block = Block.of(plan, given, shared)
        return cls(block, Keys(block), Values(block))

    def run(self, out: Any, top: Any, total: Any) -> None:
        """Writes what the block's share of tokens gives; see `Partials`."""
        block, place = self.block, (self.block.at, lax.axis_index("split"))
        self._begin()
        best, sums, product, lacking = lax.fori_loop(block.first, block.last, self._step, self._empty())
        out[place] = self.values.out(product, lacking)
        top[place] = best
        total[place] = jnp.sum(sums, axis=0)

    def _begin(self) -> None:
        block, shared = self.block, self.block.shared
        plgpu.copy_gmem_to_smem(block.given.q.at[block.at], shared.q, shared.q_here)
        pl.when(block.first < block.last)(lambda: self.keys.fetch_meta(block.first))
        for i in range(block.plan.stages):
            pl.when(block.first + i < block.last)(functools.partial(self._fetch, block.first + i))
        plgpu.barrier_wait(shared.q_here)

    def _empty(self) -> State:
        if self.block.plan.alone:
            return jnp.float32(MASKED), full(0.0, (TILE,), ROWS), *self.values.empty()
        return full(MASKED, (COLUMNS,), COLS), full(0.0, (TILE, COLUMNS), MATRIX), *self.values.empty()

    def _step(self, step: Int[Array, ""], state: State) -> State:
        """Returns the state after one more step, in log2 units. Source: online softmax, arXiv:1805.02867."""
        block, plan = self.block, self.block.plan
        top, total, product, lacking = state
        slot = block.slot(step)
        pl.when((step == block.first) | (lax.rem(step, plan.period) == 0))(lambda: self.keys.scale_queries(step))
        plgpu.barrier_wait(block.shared.here.at[slot])
        scores = self.keys.scores(step, slot)
        new = jnp.maximum(top, jnp.max(scores, axis=0))
        decay = jnp.exp2(top - new)
        p = jnp.exp2(scores - (new if plan.alone else down(new, plan.step)))
        added = self.values.weigh(slot, p)
        plgpu.commit_smem()
        product = scaled(product, decay) + self.values.products(slot)
        pl.when(step + plan.stages < block.last)(lambda: self._refill(step))
        lacking = [scaled(a, decay) + b for a, b in zip(lacking, added, strict=True)]
        return new, scaled(total, decay) + folded(p), product, lacking

    def _fetch(self, step: Int[Array, ""]) -> None:
        slot = self.block.slot(step)
        for source, target in (*self.keys.copies(step, slot), *self.values.copies(step, slot)):
            plgpu.copy_gmem_to_smem(source, target, self.block.shared.here.at[slot])

    def _refill(self, step: Int[Array, ""]) -> None:
        plgpu.commit_smem()  # What this step has read is not to be overtaken by the copy.
        self._fetch(step + self.block.plan.stages)
