"""One program of split-KV decode attention: online softmax over its share of a row, the latest, or rows beside it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from kernels.gpu.fields import exp2
from kernels.gpu.settled import MASKED
from kernels.gpu.triton.keys import DenseKeys, PackedKeys
from kernels.gpu.triton.latest import LatestKeys, LatestValues
from kernels.gpu.triton.shapes import Shapes, over
from kernels.gpu.triton.values import DenseValues, PackedValues, Sums

State = tuple[Float[Array, "rows"], Float[Array, "n rows"], Sums]
"""The largest score so far, the sums of weights, a row a token of a tile, and those of weighted values."""


@dataclasses.dataclass(frozen=True)
class Side:
    """How many bits one side has, and where its tokens and groups lie; see `settled.Codes`."""

    bits: int
    group: int
    run: int
    offset: int
    arrays: int


@dataclasses.dataclass(frozen=True)
class Program:
    """What is known when the kernel is compiled.

    Args:
        splits: shares of a row's settled tokens; 0: others see to them. Behind these programs come one for the latest
            tokens, if `latest`, and one for rows beside the codes, if `tail`.
        latest, tail: tokens and rows that are taken at once; 0: there are none.
        rings: whether the latest keys, and values, come in arrays of their own.
    """

    shapes: Shapes
    keys: Side
    values: Side
    splits: int
    latest: int
    rings: tuple[bool, bool]
    tail: int
    scale: float

    @property
    def programs(self) -> int:
        """Programs of a row and kv head."""
        return self.splits + (self.latest > 0) + (self.tail > 0)

    def __call__(self, count_ref: Any, q_ref: Any, *refs: Any) -> None:
        *inputs, out_ref, top_ref, total_ref = refs
        first, second = self.keys.arrays, self.keys.arrays + self.values.arrays
        number = pl.program_id(1)

        def store(values: Any, state: State) -> None:
            top, total, out = state[0], jnp.sum(state[1], axis=0), values.out(state[2])
            top_ref[...], total_ref[...] = top.reshape(top_ref.shape), total.reshape(total_ref.shape)
            out_ref[...] = out.reshape(out_ref.shape)

        def share() -> None:
            keys, values = self._keys(q_ref, inputs[:first]), self._values(inputs[first:second])
            store(values, self._share(keys, values, count_ref[0], number))

        def latest() -> None:
            left_ref, *rings = inputs[second:]
            first_token = count_ref[0]
            keys = self._latest_keys(q_ref, inputs[0], rings)
            values = self._latest_values(inputs[first:second], rings, first_token, first_token + left_ref[0])
            store(values, self._latest(keys, values, left_ref[0]))

        def beside() -> None:
            k_ref, v_ref, bias_ref = inputs[-3:]
            shapes = self._of(self.tail)
            values = DenseValues(shapes, v_ref, 0, 1)
            keys = DenseKeys.of(shapes, k_ref, q_ref, self.scale)
            store(values, self._rest(keys, values, bias_ref))

        if self.programs == self.splits:
            return share()
        if self.splits:
            pl.when(number < self.splits)(share)
        if self.latest:
            pl.when(number == self.splits)(latest)
        if self.tail:
            pl.when(number == self.programs - 1)(beside)
        return None

    def _keys(self, q_ref: Any, refs: list[Any]) -> DenseKeys | PackedKeys:
        if self.keys.bits == 16:
            return DenseKeys.of(self.shapes, refs[0], q_ref, self.scale)
        return PackedKeys.of(self.shapes, refs, self.keys.bits, self.keys.group, q_ref, self.scale)

    def _values(self, refs: list[Any]) -> DenseValues | PackedValues:
        if self.values.bits == 16:
            return DenseValues(self.shapes, refs[0], self.values.offset, 2)
        return PackedValues.of(self.shapes, refs, self.values.bits, self.values.group, self.values.run)

    def _latest_keys(self, q_ref: Any, stored: Any, rings: list[Any]) -> LatestKeys:
        ring = self.rings[0]
        rows = rings[0] if ring else stored
        return LatestKeys.of(self._of(self.latest), rows, ring, self.keys.offset, q_ref, self.scale)

    def _latest_values(self, refs: list[Any], rings: list[Any], first: Any, end: Any) -> LatestValues:
        shapes, exact = self._of(self.latest), self.values.bits == 16
        ring = rings[self.rings[0]] if self.rings[1] else None
        codes = None if exact else PackedValues.of(shapes, refs, self.values.bits, self.values.group, self.values.run)
        return LatestValues(shapes, first, end, codes, refs[0] if exact else ring, self.values.offset)

    def _of(self, tokens: int) -> Shapes:
        """Returns the extents where so many tokens are taken at once."""
        return dataclasses.replace(self.shapes, tokens=tokens, lanes=tokens)

    def _share(self, keys: Any, values: Any, count: Int[Array, ""], number: Int[Array, ""]) -> State:
        """Returns the state after one share of the row's settled tokens."""
        shapes, tiles = self.shapes, values.tiles
        steps = values.steps(count)
        each = pl.cdiv(steps, self.splits)
        low = jnp.minimum(number * each, steps)
        together = keys.together(tiles, values.stride)
        exact = shapes.capacity % (tiles * values.stride) == 0
        lane = jnp.arange(shapes.tokens)

        def step(at: Int[Array, ""], state: State) -> State:
            scores = []
            for tile in range(tiles):
                start = values.first(at) + tile * values.stride
                if tile % together == 0:
                    operands = keys.operands(start, together)
                rows = shapes.row_index(start, self.keys.offset, exact)
                seen = lane < jnp.minimum(count - start, shapes.lanes)
                own = keys.scores(operands, tile % together, together, rows)
                scores.append(jnp.where(seen[:, None] if own.ndim > 1 else seen, own, MASKED))
            return _online(values, state, scores, at)

        return jax.lax.fori_loop(low, jnp.minimum(low + each, steps), step, self._start(values))

    def _latest(self, keys: LatestKeys, values: LatestValues, count: Int[Array, ""]) -> State:
        """Returns the state after so many of the latest tokens."""

        def step(at: Int[Array, ""], state: State) -> State:
            token = values.tokens(at)
            seen, own = token < values.end, keys.scores(token)
            return _online(values, state, [jnp.where(seen[:, None] if own.ndim > 1 else seen, own, MASKED)], at)

        return jax.lax.fori_loop(0, pl.cdiv(count, self.latest), step, self._start(values))

    def _rest(self, keys: DenseKeys, values: DenseValues, bias_ref: Any) -> State:
        """Returns the state after the rows beside the codes."""

        def step(at: Int[Array, ""], state: State) -> State:
            rows = pl.ds(at * self.tail, self.tail)
            bias = bias_ref[:, rows].T if self.shapes.each else bias_ref[0, rows]
            return _online(values, state, [keys.scores(None, 0, 1, rows) + bias], at)

        return jax.lax.fori_loop(0, values.v.shape[0] // self.tail, step, self._start(values))

    def _start(self, values: Any) -> State:
        each = self.shapes.each
        total = jnp.zeros((values.shapes.tokens, *each), jnp.float32)
        return jnp.full(each, MASKED, jnp.float32), total, values.empty()


def _online(values: Any, state: State, scores: list[Float[Array, "n rows"]], at: Int[Array, ""]) -> State:
    """Returns the state after one step's scores, in log2 units. Source: online softmax, arXiv:1805.02867."""
    top, total, sums = state
    highest = scores[0]
    for more in scores[1:]:
        highest = jnp.maximum(highest, more)
    peak = jnp.maximum(top, jnp.max(highest, axis=0))
    # Where all is masked so far, a masked score less the peak must not be 0.
    base = jnp.maximum(peak, MASKED / 2)
    n = scores[0].shape[0]
    weights = [exp2(own - over(base, n), values.shapes.interpret) for own in scores]
    shrink = exp2(top - peak, values.shapes.interpret)
    total = total * over(shrink, n) + sum(weights[1:], weights[0])
    return peak, total, values.add(tuple(_shrunk(x, shrink) for x in sums), weights, at)


def _shrunk(x: Float[Array, "n *columns"], shrink: Float[Array, "*rows"]) -> Float[Array, "n *columns"]:
    """Returns sums times their query row's factor; columns are blocks of rows."""
    if not shrink.ndim:
        return x * shrink
    blocks = x.shape[1] // shrink.shape[0]
    return x * jnp.broadcast_to(shrink[None], (blocks, shrink.shape[0])).reshape(-1)[None]
