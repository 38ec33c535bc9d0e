"""Walks over a model that pruning needs, each with its trail on disk: statistics, gradients, pruning in sequence."""

import contextlib
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
from lmmjax.config import LINEARS
from lmmjax.data import Encoded
from lmmjax.errors import InputError
from lmmjax.layered import Layered
from lmmjax.linears import kernel_of, path_of, with_kernels
from lmmjax.llava import Params
from lmmjax.prune.losses import Loss, measure
from lmmjax.prune.method import Method

FLAG = "--statistics"


class Task(NamedTuple):
    """What is to be done: a method, the inputs to drop of each layer's linears, and whether layers see pruned ones.

    `dtypes` say what the checkpoint stores each leaf in, to which updated weights are rounded.
    """

    method: Method
    drops: Sequence[Mapping[str, int]]
    sequential: bool
    dtypes: Mapping[str, DTypeLike]


class Done(NamedTuple):
    """A pruned layer: its new kernels, the order of inputs of permuted ones, and the figures of each linear."""

    kernels: dict[str, Array]
    orders: dict[str, Array]
    losses: list[Loss]


@dataclasses.dataclass(frozen=True)
class Passes:
    """Walks of one model over the same samples; `choice` of tokens as in `tokens.choose`. Trails are under `root`.

    `one_shot` says that pruning will read the dense model's statistics, so that whoever else needs them takes these.
    """

    model: Layered
    sets: Sequence[Encoded]
    root: Path
    choice: str = "all"
    grams: bool = True
    one_shot: bool = False

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
        trail = self.dense(self.grams and self.one_shot)
        return tuple(from_arrays(trail.read(index)[0]).without_grams() for index in range(self.layers))

    def dense(self, grams: bool) -> Trail:
        """Returns the trail of the dense model's statistics, walked to its end; one with Grams serves without, too."""
        with_grams = self._trail(walk="one-shot", grams=True)
        trail = with_grams if grams or with_grams.done == self.layers else self._trail(walk="one-shot", grams=False)
        if trail.done == self.layers:
            return trail
        with trail.alone(FLAG):
            rows = self._entering(trail)
            for index in self._bar(trail, "statistics of the dense model"):
                layer, where = self.model.layer(index), f"layer {index}"
                stats = walk.look(self.model.config.text, layer, rows, self.choice, grams, move=True, where=where)
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
        """Yields each layer as the task has it; what an interrupted run of the same task has done is not done again."""
        slopes = self.gradients() if task.method.gradients else None
        dense = None if task.sequential else self.dense(self.grams)
        trail = self._of(task)
        with trail.alone(FLAG):
            if dense is None:
                self._in_sequence(task, trail, slopes)
            else:
                self._each(task, trail, dense, slopes)
            for index in range(self.layers):
                yield _done(*trail.read(index))

    def forget(self, task: Task) -> None:
        """Removes what an interrupted run would go on from, unless another process is at it."""
        trail = self._of(task)
        with contextlib.suppress(InputError), trail.alone(FLAG):
            shutil.rmtree(trail.directory, ignore_errors=True)

    def _each(self, task: Task, trail: Trail, dense: Trail, slopes: Trail | None) -> None:
        """Prunes each layer by the dense model's statistics."""
        left = [index for index in range(self.layers) if index not in trail]
        bar = tqdm(left, desc=_saying(task), initial=self.layers - len(left), total=self.layers, unit="layer")
        for index in bar:
            stats = _sloped(from_arrays(dense.read(index)[0]), slopes, index)
            done = self._prune(task, index, self.model.layer(index), stats)
            trail.add(index, *_parts(done, index, task.dtypes))

    def _in_sequence(self, task: Task, trail: Trail, slopes: Trail | None) -> None:
        """Prunes each layer by statistics taken behind the pruned layers before it."""
        text = self.model.config.text
        rows = self._entering(trail)
        for index in self._bar(trail, _saying(task)):
            layer = self.model.layer(index)
            stats = walk.look(text, layer, rows, self.choice, self.grams, move=False, where=f"layer {index}")
            done = self._prune(task, index, layer, _sloped(stats, slopes, index))
            walk.move(text, with_kernels(layer, done.kernels), rows)
            trail.add(index, *_parts(done, index, task.dtypes), rows)

    def _entering(self, trail: Trail) -> list[Rows]:
        """Returns the rows at the first layer that is not done."""
        if trail.done == self.layers:
            return []
        return trail.rows() if trail.done else self.rows()

    def _prune(self, task: Task, index: int, layer: Params, stats: LayerStatistics) -> Done:
        _, found = task.method.layer(layer, stats, task.drops[index], f"layer {index}")
        for name, one in found.items():
            stored = task.dtypes[path_of(index, name)]
            found[name] = one._replace(weight=one.weight.astype(stored).astype(one.weight.dtype))
        losses = [measure(index, name, kernel_of(layer, name), found.get(name), stats[name].gram) for name in LINEARS]
        orders = {name: one.order for name, one in found.items() if one.order is not None}
        return Done({name: one.weight for name, one in found.items()}, orders, losses)

    def _of(self, task: Task) -> Trail:
        """Returns the trail of a task's pruned layers, named by all that decides them."""
        told = {name: str(dtype) for name, dtype in task.dtypes.items()}, [dict(drops) for drops in task.drops]
        digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]
        walked = "sequential" if task.sequential else "pruned one-shot"
        return self._trail(walk=walked, grams=self.grams, task=digest, **dataclasses.asdict(task.method))

    def _trail(self, **about: Any) -> Trail:
        return Trail(self.root, {**self._about, **about}, self.layers)  # pyright: ignore[reportAttributeAccessIssue]

    def _bar(self, trail: Trail, what: str) -> Iterator[int]:
        rest = range(trail.done, self.layers)
        return iter(tqdm(rest, desc=what, initial=trail.done, total=self.layers, unit="layer"))


def _saying(task: Task) -> str:
    return f"pruning by {task.method.label}"


def _parts(done: Done, index: int, dtypes: Mapping[str, DTypeLike]) -> tuple[dict[str, Array], list[dict[str, Any]]]:
    """Returns a layer as a trail keeps it: kernels in what the checkpoint stores, to which they are rounded already."""
    kernels = {name: kernel.astype(dtypes[path_of(index, name)]) for name, kernel in done.kernels.items()}
    orders = {f"{name}.order": order for name, order in done.orders.items()}
    return kernels | orders, [loss._asdict() for loss in done.losses]


def _done(arrays: dict[str, Array], facts: list[dict[str, Any]]) -> Done:
    """Returns the layer that `_parts` took apart."""
    orders = {name.removesuffix(".order"): array for name, array in arrays.items() if name.endswith(".order")}
    kernels = {name: array for name, array in arrays.items() if not name.endswith(".order")}
    return Done(kernels, orders, [Loss(**fact) for fact in facts])


def _sloped(stats: LayerStatistics, slopes: Trail | None, index: int) -> LayerStatistics:
    """Returns the statistics with the gradients of a trail, if there is one."""
    return stats if slopes is None else stats.with_gradients(slopes.read(index)[0])
