"""Walks over a model that pruning needs, each with its trail on disk: statistics, gradients, pruning in sequence."""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jax.typing import DTypeLike
from jaxtyping import Array
from tqdm import tqdm

from lmmjax.calibrate import gradients, samples, walk
from lmmjax.calibrate.statistics import LayerStatistics, from_arrays, to_arrays
from lmmjax.calibrate.tokens import Rows
from lmmjax.calibrate.trail import Trail
from lmmjax.data import Encoded
from lmmjax.layered import Layered
from lmmjax.linears import kernel_of, with_kernels
from lmmjax.llava import Params
from lmmjax.prune.losses import Loss, measure
from lmmjax.prune.method import Method

FLAG = "--statistics"


class Task(NamedTuple):
    """What is to be done: a method, the inputs to drop of each layer's linears, and whether layers see pruned ones.

    `dtype` is what the checkpoint stores a linear's weights in, to which updated ones are rounded.
    """

    method: Method
    drops: Sequence[Mapping[str, int]]
    sequential: bool
    dtype: Mapping[str, DTypeLike]


class Done(NamedTuple):
    """A pruned layer: its new kernels, the order of inputs of permuted ones, and the figures of each linear."""

    kernels: dict[str, Array]
    orders: dict[str, Array]
    losses: list[Loss]


@dataclasses.dataclass(frozen=True)
class Passes:
    """Walks of one model over the same samples; `choice` of tokens as in `tokens.choose`. Trails are under `root`."""

    model: Layered
    sets: Sequence[Encoded]
    root: Path
    choice: str = "all"
    grams: bool = True

    def __post_init__(self):
        walk.check_choice(self.choice)
        about = {"weights": self.model.digest(), "samples": samples.digest(self.sets), "tokens": self.choice}
        object.__setattr__(self, "_about", about)

    @property
    def layers(self) -> int:
        return self.model.config.text.layers

    def rows(self) -> list[Rows]:
        """Returns the samples at the decoder's entrance."""
        return walk.embedded(self.model.config, self.model.outer, self.sets)

    def statistics(self) -> tuple[LayerStatistics, ...]:
        """Returns the dense model's statistics, without Gram matrices: all layers' would be too much to hold."""
        trail = self.dense()
        return tuple(_light(from_arrays(trail.read(index)[0])) for index in range(self.layers))

    def dense(self) -> Trail:
        """Returns the trail of the dense model's statistics, walked to its end; one with Grams serves without, too."""
        with_grams = self._trail(walk="one-shot", grams=True)
        trail = (
            with_grams if self.grams or with_grams.done == self.layers else self._trail(walk="one-shot", grams=False)
        )
        text = self.model.config.text
        if trail.done == self.layers:
            return trail
        with trail.alone(FLAG):
            rows = trail.rows() if trail.done else self.rows()
            for index in self._bar(trail, "statistics of the dense model"):
                stats = walk.look(text, self.model.layer(index), rows, self.choice, self.grams, move=True)
                trail.add(index, to_arrays(stats), rows=rows)
        return trail

    def gradients(self) -> Trail:
        """Returns the trail of the dense model's gradients, which begins anew if it was interrupted."""
        trail = self._trail(walk="gradients")
        if trail.done == self.layers:
            return trail
        with trail.alone(FLAG):
            found = gradients.sizes(self.model, self.rows(), trail.directory)
            for index, kernels in tqdm(found, desc="gradients", total=self.layers, unit="layer"):
                trail.add(index, kernels)
        return trail

    def pruned(self, task: Task) -> Iterator[Done]:
        """Yields each layer as the task has it."""
        slopes = self.gradients() if task.method.gradients else None
        if task.sequential:
            yield from self._in_sequence(task, slopes)
            return
        trail = self.dense()
        for index in tqdm(range(self.layers), desc=f"pruning by {task.method.label}", unit="layer"):
            stats = _sloped(from_arrays(trail.read(index)[0]), slopes, index)
            yield self._prune(task, index, self.model.layer(index), stats)

    def forget(self, task: Task) -> None:
        """Removes what an interrupted sequential run would go on from."""
        if task.sequential:
            shutil.rmtree(self._sequence(task).directory, ignore_errors=True)

    def _in_sequence(self, task: Task, slopes: Trail | None) -> Iterator[Done]:
        trail, text = self._sequence(task), self.model.config.text
        with trail.alone(FLAG):
            rows = trail.rows() if 0 < trail.done < self.layers else self.rows()
            for index in self._bar(trail, f"pruning by {task.method.label}"):
                layer = self.model.layer(index)
                stats = walk.look(text, layer, rows, self.choice, self.grams, move=False)
                done = self._prune(task, index, layer, _sloped(stats, slopes, index))
                walk.move(text, with_kernels(layer, done.kernels), rows)
                orders = {f"{name}.order": order for name, order in done.orders.items()}
                trail.add(index, done.kernels | orders, [loss._asdict() for loss in done.losses], rows)
            for index in range(self.layers):
                arrays, facts = trail.read(index)
                orders = {name.removesuffix(".order"): a for name, a in arrays.items() if name.endswith(".order")}
                kernels = {name: a for name, a in arrays.items() if not name.endswith(".order")}
                yield Done(kernels, orders, [Loss(**fact) for fact in facts])

    def _prune(self, task: Task, index: int, layer: Params, stats: LayerStatistics) -> Done:
        _, found = task.method.layer(layer, stats, task.drops[index], f"layer {index}")
        rounded = {
            name: pruned._replace(weight=pruned.weight.astype(task.dtype[name]).astype(pruned.weight.dtype))
            for name, pruned in found.items()
        }
        losses = [measure(index, name, kernel_of(layer, name), p, stats[name].gram) for name, p in rounded.items()]
        orders = {name: p.order for name, p in rounded.items() if p.order is not None}
        return Done({name: p.weight for name, p in rounded.items()}, orders, losses)

    def _sequence(self, task: Task) -> Trail:
        drops = hashlib.sha256(json.dumps([dict(d) for d in task.drops]).encode()).hexdigest()[:16]
        return self._trail(walk="sequential", grams=self.grams, drops=drops, **dataclasses.asdict(task.method))

    def _trail(self, **about: Any) -> Trail:
        return Trail(self.root, {**self._about, **about}, self.layers)  # pyright: ignore[reportAttributeAccessIssue]

    def _bar(self, trail: Trail, what: str) -> Iterator[int]:
        rest = range(trail.done, self.layers)
        return iter(tqdm(rest, desc=what, initial=trail.done, total=self.layers, unit="layer"))


def _sloped(stats: LayerStatistics, slopes: Trail | None, index: int) -> LayerStatistics:
    """Returns the statistics with the gradients of a trail, if there is one."""
    if slopes is None:
        return stats
    arrays, _ = slopes.read(index)
    return stats.replace(linears={name: one.replace(gradient=arrays[name]) for name, one in stats.linears.items()})


def _light(stats: LayerStatistics) -> LayerStatistics:
    return stats.replace(linears={name: one.replace(gram=None) for name, one in stats.linears.items()})
