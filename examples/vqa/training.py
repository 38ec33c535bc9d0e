"""One training step, a state that a killed run goes on from, and the log of a run."""

import functools
import io
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from lmmjax.errors import InputError
from lmmjax.files import read_json, write_atomic


class State(flax.struct.PyTreeNode):
    """All that a run goes on from: what is trained, the optimizer's moments, and the steps done."""

    params: Any
    moments: Any
    step: Int[Array, ""]


def initial(params: Any, optimizer: optax.GradientTransformation) -> State:
    """Returns the state before the first step."""
    return State(params, optimizer.init(params), jnp.zeros((), jnp.int32))


@functools.cache
def make_step(optimizer: optax.GradientTransformation, loss: Callable) -> Callable[..., tuple[State, Float[Array, ""]]]:
    """Returns the compiled step (state, *batch) -> (state, loss), one program for equal arguments."""

    @jax.jit
    def step(state: State, *batch: Any) -> tuple[State, Float[Array, ""]]:
        value, gradient = jax.value_and_grad(loss)(state.params, *batch)
        updates, moments = optimizer.update(gradient, state.moments, state.params)
        return State(optax.apply_updates(state.params, updates), moments, state.step + 1), value

    return step


def is_matrix(tree: Any) -> Any:
    """Returns which leaves weight decay is for: matrices, no biases and norms."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, tree)


def stages(lengths: Sequence[int], rate: float, warmup: int = 100) -> optax.Schedule:
    """Returns a rate that warms up and decays to a fiftieth in each stage on its own."""

    def stage(length: int) -> optax.Schedule:
        return optax.warmup_cosine_decay_schedule(0.0, rate, min(warmup, length // 5), length, 0.02 * rate)

    ends = np.cumsum(lengths)[:-1].tolist()
    return optax.join_schedules([stage(length) for length in lengths], ends)


def require_counts(settings: Mapping[str, Any]) -> None:
    """Raises InputError for a whole number, or one of a list of them, below 1; a seed may be 0."""
    for name, value in settings.items():
        least = 0 if name == "seed" else 1
        numbers = value if isinstance(value, list) else [value]
        if any(isinstance(number, int) and number < least for number in numbers):
            raise InputError(f"--{name.replace('_', '-')}: got {value}, expected {least} or more")


def claim(directory: Path, settings: Mapping[str, Any]) -> None:
    """Keeps what a run is defined by in its directory, as settings.json.

    Raises:
        InputError: a run that the directory holds, to be gone on with, is defined otherwise.
    """
    file = directory / "settings.json"
    kept = read_json(file) if file.exists() else settings
    if others := [name for name in settings if kept.get(name) != settings[name]]:
        told = "; ".join(f"{name} = {kept.get(name)}, not {settings[name]}" for name in others)
        raise InputError(f"--out: the run in {directory} has {told}; give the same, or another --out")
    write_atomic(file, json.dumps(settings, indent=2) + "\n")


def save(path: Path, state: State) -> None:
    """Writes the state whole or not at all."""
    buffer = io.BytesIO()
    np.savez(buffer, *(np.asarray(leaf) for leaf in jax.tree.leaves(state)))
    write_atomic(path, buffer.getvalue())


def restore(path: Path, state: State) -> State:
    """Returns the state stored there; the given one if there is none.

    Raises:
        InputError: what is stored is the state of another model or optimizer.
    """
    if not path.exists():
        return state
    with np.load(path) as stored:
        leaves = [jnp.asarray(stored[f"arr_{index}"]) for index in range(len(stored.files))]
    if [leaf.shape for leaf in leaves] != [leaf.shape for leaf in jax.tree.leaves(state)]:
        raise InputError(f"{path}: the state of another model; give another --out, or remove it to begin anew")
    return jax.tree.unflatten(jax.tree.structure(state), leaves)


class Log:
    """JSON lines {stage, step, loss (mean since the line before), seconds, and now and then held-out accuracy}."""

    def __init__(self, path: Path, first: int):
        lines = path.read_text().splitlines() if path.exists() else []
        # What a killed run logged after its last save is done, and logged, again.
        self.lines = [line for line in lines if json.loads(line)["step"] <= first]
        self.path, self.losses = path, []
        self.start = time.monotonic() - (json.loads(self.lines[-1])["seconds"] if self.lines else 0)

    def write(self, stage: str, step: int, more: dict[str, float]) -> None:
        seconds = round(time.monotonic() - self.start)
        line = {"stage": stage, "step": step, "loss": round(float(np.mean(self.losses)), 4), "seconds": seconds, **more}
        self.lines.append(json.dumps(line))
        self.losses = []
        write_atomic(self.path, "\n".join(self.lines) + "\n")


def run_steps(
    out: Path,
    fresh: State,
    total: int,
    step: Callable[[int, State], tuple[str, State, Float[Array, ""]]],
    check: Callable[[str, State], dict[str, float]],
    *,
    every: int,
    line: int,
) -> State:
    """Returns the state after `total` steps; goes on from the one saved in `out`, if any.

    `step` makes (stage, state, loss) of a step's number and the state before it. Every `every` steps and in the
    end the state is saved, and the log has what `check` says of it; a line of the log is `line` steps at most.
    """
    state = restore(out / "state.npz", fresh)
    first = int(state.step)
    log = Log(out / "log.jsonl", first)
    bar = tqdm(range(first, total), initial=first, total=total, unit="step", file=sys.stderr)
    for index in bar:
        stage, state, loss = step(index, state)
        log.losses.append(float(loss))
        bar.set_postfix(stage=stage, loss=f"{log.losses[-1]:.3f}")
        done = index + 1
        saving = done % every == 0 or done == total
        if done % line == 0 or saving:
            log.write(stage, done, check(stage, state) if saving else {})
        if saving:
            save(out / "state.npz", state)
    return state
