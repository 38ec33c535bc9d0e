"""Values of a step, weighted and added up: p times the spans of groups, multiplied with the words' fields."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from kernels.gpu.fields import LIFT, WHOLE
from kernels.gpu.mosaic import layouts
from kernels.gpu.mosaic.block import Block, Copy
from kernels.gpu.mosaic.layouts import GROUPS, MATRIX, ROWS, across, down, folded, full, joined, load
from kernels.gpu.mosaic.plan import COLUMNS, LANES, TILE
from kernels.gpu.mosaic.registers import own_column, twice


@dataclasses.dataclass(frozen=True)
class Values:
    """Values as words (d, s / fields) a plane; spans and zeros (d / group, s).

    Their sums are the products', a column a query, or a group for a lone query, and what these lack: for each group of
    channels, or of all for a lone query, a row a token of a tile.
    """

    block: Block

    def copies(self, step: Int[Array, ""], slot: Int[Array, ""]) -> Iterator[Copy]:
        """Yields the copies of a step's words and metadata to a stage."""
        plan, given, shared, at = self.block.plan, self.block.given, self.block.shared, self.block.at
        for source, target in zip(given.values, shared.values, strict=True):
            size = target.shape[-1]
            yield source.at[at, :, pl.ds(step * size, size)], target.at[slot]
        groups = plan.value_groups
        for source, target in zip(given.value_meta, shared.value_meta, strict=True):
            size = target.shape[2]
            for i in range(plan.value_copies):
                yield source.at[at, :, pl.ds(step * size, size)], target.at[slot, pl.ds(i * groups, groups)]

    def empty(self) -> tuple[Array, list[Array]]:
        """Returns the sums before the first step."""
        plan = self.block.plan
        product = full(0.0, (plan.dim, plan.value_columns), MATRIX)
        if not plan.alone:
            return product, [full(0.0, (TILE, COLUMNS), MATRIX) for _ in range(plan.value_groups)]
        return product, [full(0.0, (TILE,), ROWS) if plan.value_groups == 1 else full(0.0, (LANES, TILE), GROUPS)]

    def weigh(self, slot: Int[Array, ""], p: Float[Array, "s *m"]) -> list[Array]:
        """Writes p times the spans of values, and returns what the products with these lack, before it is summed up."""
        plan, shared = self.block.plan, self.block.shared
        p = down(p, LANES) if plan.alone and plan.value_groups > 1 else p
        spans, zeros = (self._meta(meta, slot) for meta in shared.value_meta)
        lacking = [folded(p * zero) * (LIFT * plan.values.levels) for zero in zeros]
        for plane, operand in zip(plan.values.planes, shared.weights, strict=True):
            weights = [LIFT * plane.weight(i % plane.fields) for i in range(plan.step // TILE)]
            scaled = [layouts.weighted(p * span, weights).astype(jnp.float16) for span in spans]
            operand.at[slot].T[...] = self._columns(scaled)
        return lacking

    def products(self, slot: Int[Array, ""]) -> Float[Array, "d n"]:
        """Returns the products of a step's values with their weights."""
        plan, shared = self.block.plan, self.block.shared

        def multiply(acc: Any) -> None:
            for plane, value, weight in zip(plan.values.planes, shared.values, shared.weights, strict=True):
                for k in range(0, value.shape[-1], TILE):
                    word = load(value.at[slot, :, pl.ds(k, TILE)], MATRIX)
                    at = weight.at[slot, :, pl.ds(k * plane.fields, TILE * plane.fields)]
                    self.block.multiply(acc, plane, word, at, TILE)

        return self.block.summed((plan.dim, plan.value_columns), multiply)

    def out(self, product: Float[Array, "d n"], lacking: list[Array]) -> Float[Array, "d *m"]:
        """Returns the weighted sum of values."""
        plan = self.block.plan
        product = product * WHOLE + down(jnp.sum(self._columns(lacking), axis=0), plan.dim)
        if plan.alone:
            column = lax.div(layouts.row_index((plan.dim,)), plan.values.group) * (COLUMNS // LANES)
            product = own_column(product, column, plan.interpret)
        else:
            product = layouts.by_group(product, plan.values.group)
        return product * (1 / (LIFT * plan.values.levels))

    def _meta(self, meta: Any, slot: Int[Array, ""]) -> list[Array]:
        """Returns spans or zeros: (s,), or (4, s) with a group for each lane, or (s, 8) for each group."""
        plan, pieces = self.block.plan, range(meta.shape[2])
        if plan.alone and plan.value_groups > 1:
            parts = [load(meta.at[slot, :, i], GROUPS, optimized=False) for i in pieces]
            return [joined(parts, 1).astype(jnp.float32)]
        groups = [joined([load(meta.at[slot, g, i], ROWS) for i in pieces]) for g in range(plan.value_groups)]
        groups = [x.astype(jnp.float32) for x in groups]
        return groups if plan.alone else [across(x) for x in groups]

    def _columns(self, parts: Sequence[Array]) -> Array:
        """Returns the groups' parts side by side, 8 columns each; a lone query's groups have 8 columns altogether."""
        if not self.block.plan.alone:
            return joined(parts, 1)
        (x,) = parts
        return across(x) if x.ndim == 1 else twice(x, self.block.plan.interpret)
