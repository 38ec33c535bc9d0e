"""One run of the prune command: calibrate, allocate, prune layer by layer, write the checkpoint, say what it cost."""

import argparse
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from flax.traverse_util import flatten_dict
from jax.typing import DTypeLike
from jaxtyping import Array

from lmmjax import checkpoint, files, layered, machine, orders, runtime, weights
from lmmjax.calibrate import samples
from lmmjax.calibrate.samples import Recipe
from lmmjax.config import LINEARS, LlavaConfig
from lmmjax.data import EASY_VQA, located
from lmmjax.errors import InputError
from lmmjax.linears import path_of, with_kernels
from lmmjax.llava import Params
from lmmjax.plan import CacheFormat, Calibration, LayerPlan, Plan
from lmmjax.prompt import Processor
from lmmjax.prune import report
from lmmjax.prune.losses import Loss
from lmmjax.prune.method import Method
from lmmjax.prune.passes import Passes, Task
from lmmjax.prune.targets import Targets, parse_pattern

LENGTH = 2048
"""Tokens of a window of text, if the model's context has room for them: what published pruners calibrate on."""


def run(args: argparse.Namespace) -> int:
    """Prunes, writes OUT (and the export), and prints the report."""
    runtime.prepare()
    for target in filter(None, (args.out, args.export)):
        files.refuse_existing(target)
    if args.export is not None:
        _require_apart(args.export, args.out)
    method, targets = _asked(args)
    path = checkpoint.resolve(args.model)
    config, plan = checkpoint.described(path)
    checkpoint.require_dense(path, plan)
    targets.check(config.text)
    recipe = _recipe(args, config)
    passes = _passes(args, path, config, recipe, method)
    task = Task(method, targets.drops(passes, args.seed), not args.one_shot, _dtypes(path))
    _tell_of_what_goes_whole(task.drops, config)
    losses = _write(args, path, passes, task, recipe)
    passes.forget(task)
    print(f"{report.text(losses)}\n\nwritten: {args.out}")
    return _export(args)


def _require_apart(export: Path, out: Path) -> None:
    one, other = export.resolve(), out.resolve()
    if one == other or one in other.parents or other in one.parents:
        raise InputError(f"--export: got {export}, which is OUT, or within it or around it; expected another directory")


def _tell_of_what_goes_whole(drops: Sequence[Mapping[str, int]], config: LlavaConfig) -> None:
    """Says on stderr which linears an allocation leaves nothing of: a legal wish, but hardly anyone's."""
    for index, row in enumerate(drops):
        gone = [name for name, drop in row.items() if drop == config.text.linear_shape(name)[0]]
        if gone:
            print(f"layer {index}: all weights of {', '.join(gone)} are to go; ask for less", file=sys.stderr)


def _asked(args: argparse.Namespace) -> tuple[Method, Targets]:
    pattern = parse_pattern(args.pattern)
    plan = Plan.load(args.plan) if args.plan else None
    update = None if args.update == "none" else args.update
    for flag, got, least in (("--samples", args.samples, 1), ("--windows", args.windows, 1), ("--seed", args.seed, 0)):
        if got < least:
            raise InputError(f"{flag}: got {got}, expected at least {least}")
    return Method(args.method, update, pattern, args.permute), Targets(args.sparsity, pattern, plan, args.allocation)


def _recipe(args: argparse.Namespace, config: LlavaConfig) -> Recipe:
    length = min(LENGTH, config.text.context) if args.length is None else args.length
    if not 2 <= length <= config.text.context:
        raise InputError(f"--length: got {length}, expected 2 to the model's {config.text.context}")
    data = args.data or (None if args.text else EASY_VQA)
    return Recipe(data and located(data), args.samples, tuple(args.text), args.windows, length, args.seed)


def _passes(args: argparse.Namespace, path: Path, config: LlavaConfig, recipe: Recipe, method: Method) -> Passes:
    sets = samples.encode(Processor.load(path, config), recipe)
    grams = method.grams or not args.light
    return Passes(
        layered.stored(path, config), sets, args.statistics, choice=args.tokens, grams=grams, one_shot=args.one_shot
    )


def _dtypes(path: Path) -> dict[str, np.dtype]:
    """Returns what the checkpoint stores each leaf in."""
    return {name: np.dtype(leaf.dtype) for name, leaf in weights.leaves(path / "params").items()}


def _write(args: argparse.Namespace, path: Path, passes: Passes, task: Task, recipe: Recipe) -> list[Loss]:
    """Writes OUT, layer by layer; returns all figures."""
    losses: list[Loss] = []
    ordered: dict[str, Array] = {}
    beside: dict[str, bytes] = {}
    config = (path / "config.json").read_bytes()
    carried, plan = checkpoint.carried_files(path), _plan(args, task, recipe)
    with checkpoint.writer(args.out, config, carried, plan, beside) as leaves:
        _add(leaves, "", passes.model.outer, task.dtypes)
        for index, done in enumerate(passes.pruned(task)):
            layer = with_kernels(passes.model.layer(index), done.kernels)
            _add(leaves, f"text.layers_{index}.", layer, task.dtypes)
            losses += done.losses
            ordered |= {orders.name_of(index, name): order for name, order in done.orders.items()}
        figures = {"about": machine.facts("lmmjax.prune", args.words), **report.as_json(losses)}
        beside["pruning.json"] = (json.dumps(figures, indent=1, allow_nan=False) + "\n").encode()
        beside |= orders.as_file(ordered)
    return losses


def _add(leaves: weights.Writer, prefix: str, tree: Params, dtypes: Mapping[str, DTypeLike]) -> None:
    """Adds leaves in the dtypes that they were stored in; those of pruned linears are rounded to it already."""
    for name, leaf in flatten_dict(tree, sep=".").items():
        leaves.add(prefix + name, np.asarray(leaf).astype(dtypes[prefix + name]))


def _plan(args: argparse.Namespace, task: Task, recipe: Recipe) -> Plan:
    """Returns the plan that the checkpoint carries; one that says all can be replayed.

    Its cache is exact, in the dtype of the weights.
    """
    calibration = Calibration(recipe.data or "text", recipe.samples, args.tokens, recipe.seed)
    says_all = task.method.replayable and not task.sequential and not recipe.text
    made_by = None if says_all else shlex.join(["python", "-m", "lmmjax.prune", *args.words])
    cache = CacheFormat(dtype=str(task.dtypes[path_of(0, LINEARS[0])]))
    layers = tuple(LayerPlan(drop=drop) for drop in task.drops)
    return Plan(layers, score=task.method.name, calibration=calibration, cache=cache, made_by=made_by)


def _export(args: argparse.Namespace) -> int:
    if args.export is None:
        return 0
    if (reason := checkpoint.run_convert("export", args.out, args.export)) is not None:
        raise InputError(f"--export: {args.out} is written, but not its export ({reason})")
    print(f"exported: {args.export}")
    return 0
