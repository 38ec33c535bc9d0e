"""Scores of a step's keys: queries times the spans of groups, multiplied with the words' fields."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from kernels.gpu.fields import WHOLE
from kernels.gpu.mosaic.block import Block, Copy
from kernels.gpu.mosaic.layouts import COLS, MATRIX, ROWS, across, by_group, down, joined, load, row_index
from kernels.gpu.mosaic.memory import box
from kernels.gpu.mosaic.plan import COLUMNS
from kernels.gpu.mosaic.registers import own_column
from kernels.gpu.settled import MASKED


@dataclasses.dataclass(frozen=True)
class Keys:
    """Keys as words (s, w) a plane; spans and zeros (s / group, d)."""

    block: Block

    def copies(self, step: Int[Array, ""], slot: Int[Array, ""]) -> Iterator[Copy]:
        """Yields the copies of a step's words to a stage."""
        plan, given, shared = self.block.plan, self.block.given, self.block.shared
        for source, target in zip(given.keys, shared.keys, strict=True):
            rows = box(plan, target.shape[-1])
            for i in range(0, plan.step, rows):
                tokens = source.at[self.block.at, pl.ds(step * plan.step + i, rows)]
                yield tokens, target.at[slot, pl.ds(i, rows)]

    def fetch_meta(self, step: Int[Array, ""]) -> None:
        """Copies the metadata of the groups that a step's queries are scaled for."""
        given, shared = self.block.given, self.block.shared
        groups = pl.ds(self._first_group(step), self.block.plan.ahead)
        for source, target in zip(given.key_meta, shared.key_meta, strict=True):
            plgpu.copy_gmem_to_smem(source.at[self.block.at, groups], target, shared.meta_here)

    def scale_queries(self, step: Int[Array, ""]) -> None:
        """Writes queries times the spans of the next groups of keys, and what the products with these lack.

        A column is a query, or a group for a lone query. Its products lack q * zero.
        """
        plan, shared = self.block.plan, self.block.shared
        plgpu.barrier_wait(shared.meta_here)
        for number in range(plan.key_columns // COLUMNS):
            columns = pl.ds(number * COLUMNS, COLUMNS)
            span, zero = (self._meta(meta, number) for meta in shared.key_meta)
            offset = self._query(len(plan.keys.planes)) * zero
            for i, operand in enumerate(shared.queries):
                operand.at[columns].T[...] = (self._query(i) * span).astype(jnp.float16)
            shared.offset[columns] = jnp.sum(offset, axis=0)
        plgpu.commit_smem()
        following = (lax.div(step, plan.period) + 1) * plan.period
        pl.when(following < self.block.last)(lambda: self.fetch_meta(following))

    def scores(self, step: Int[Array, ""], slot: Int[Array, ""]) -> Float[Array, "s *m"]:
        """Returns the scores of a step's tokens, without an axis of queries for a lone one."""
        plan = self.block.plan
        scores = joined([self._chunk(step, slot, i) for i in range(0, plan.step, plan.chunk)])
        left, row = self.block.count - step * plan.step, row_index(scores.shape)
        # A branch, because only a row's last step needs it.
        return lax.cond(left < plan.step, lambda: jnp.where(row < left, scores, MASKED), lambda: scores)

    def _chunk(self, step: Int[Array, ""], slot: Int[Array, ""], start: int) -> Float[Array, "n *m"]:
        plan, shared, group = self.block.plan, self.block.shared, self.block.plan.keys.group
        first = start // group // (COLUMNS if plan.alone else 1) * COLUMNS
        number = COLUMNS * (1 if plan.alone else max(1, plan.chunk // group))
        columns = pl.ds(first, number)

        def multiply(acc: Any) -> None:
            for plane, key, query in zip(plan.keys.planes, shared.keys, shared.queries, strict=True):
                word = load(key.at[slot, pl.ds(start, plan.chunk)], MATRIX)
                self.block.multiply(acc, plane, word, query.at[columns], plan.dim // plane.fields)

        product = self.block.summed((plan.chunk, number), multiply)
        offset = load(shared.offset.at[columns], COLS)
        scores = product * (WHOLE / plan.keys.levels) + down(offset, plan.chunk)
        if not plan.alone:
            return by_group(scores, group)
        group_here = lax.div(step * plan.step + start, group) - self._first_group(step) - first
        column = group_here + lax.div(row_index((plan.chunk,)), group)
        return own_column(scores, column, plan.interpret)

    def _first_group(self, step: Int[Array, ""]) -> Int[Array, ""]:
        """Returns the first group of keys that queries are scaled for; so many follow also at the end."""
        plan = self.block.plan
        return jnp.minimum(lax.div(step, plan.period) * plan.ahead, plan.groups - plan.ahead)

    def _query(self, kind: int) -> Float[Array, "d 8"]:
        q = self.block.shared.q.at[kind]
        return across(load(q, ROWS)) if self.block.plan.alone else load(q, MATRIX)

    def _meta(self, meta: Any, number: int) -> Float[Array, "d 8"]:
        if self.block.plan.alone:
            groups = meta.at[pl.ds(number * COLUMNS, COLUMNS)]
            return load(groups.T, MATRIX).astype(jnp.float32)
        return across(load(meta.at[number], ROWS).astype(jnp.float32))
