"""Gradients of the loss by every prunable weight, layer by layer from the last to the first, a sample at a time.

The hidden states that enter each layer wait in files, so that memory holds one layer, its gradient and one batch.
"""

import functools
import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from safetensors.flax import load_file

from lmmjax.calibrate import walk
from lmmjax.calibrate.layer import run
from lmmjax.calibrate.loss import losses
from lmmjax.calibrate.tokens import Rows
from lmmjax.calibrate.trail import save
from lmmjax.config import LlavaConfig, TextConfig
from lmmjax.layered import Layered
from lmmjax.linears import kernels_of, with_kernels
from lmmjax.llava import Params

Kernels = dict[str, Float[Array, "in out"]]
SCRATCH = "hidden-states-"
"""Begins the names of directories of waiting files; one that a killed process left is removed by the next."""


def sizes(model: Layered, rows: list[Rows], folder: Path) -> Iterator[tuple[int, Kernels]]:
    """Yields (layer, mean over samples of |gradient| of each linear), from the last layer to the first.

    Consumes `rows`. On disk meanwhile: all samples' hidden states before every layer, which for many long windows is
    far more than the model. `folder` is this process's alone. The loss is a sample's mean negative log-likelihood of
    its text tokens.
    """
    samples = sum(int(batch.valid.any(1).sum()) for batch in rows)
    for left in folder.glob(f"{SCRATCH}*"):
        shutil.rmtree(left)
    with TemporaryDirectory(prefix=SCRATCH, dir=folder) as name:
        waiting = Path(name)
        told = [batch.replace(x=None) for batch in rows]
        slopes = _entering(model, rows, waiting)
        for index in reversed(range(model.config.text.layers)):
            layer, total = model.layer(index), None
            for i, batch in enumerate(told):
                x = load_file(waiting / f"{index}-{i}")["x"]
                sums, slopes[i] = _back(model.config.text, layer, batch.replace(x=x), slopes[i])
                total = sums if total is None else jax.tree.map(jnp.add, total, sums)
            yield index, jax.tree.map(lambda value: value / samples, total)


def _entering(model: Layered, rows: list[Rows], waiting: Path) -> list[Float[Array, "b t e"]]:
    """Writes what enters each layer, emptying `rows`; returns the loss's gradients by what leaves the last."""
    for index in range(model.config.text.layers):
        for i, batch in enumerate(rows):
            save(waiting / f"{index}-{i}", {"x": batch.x})
        walk.move(model.config.text, model.layer(index), rows)
    return [_slope(model.config, model.outer, rows.pop(0)) for _ in range(len(rows))]


@functools.partial(jax.jit, static_argnums=0)
def _slope(config: LlavaConfig, outer: Params, rows: Rows) -> Float[Array, "b t e"]:
    def one(row: Rows) -> Float[Array, "t e"]:
        row = jax.tree.map(lambda leaf: leaf[None], row)
        return jax.grad(lambda x: losses(config, outer, row.replace(x=x)).sum())(row.x)[0]

    return jax.lax.map(one, rows)


@functools.partial(jax.jit, static_argnums=0)
def _back(
    text: TextConfig, layer: Params, rows: Rows, slope: Float[Array, "b t e"]
) -> tuple[Kernels, Float[Array, "b t e"]]:
    """Returns the sums of |gradient|, and the gradient by what enters the layer."""
    kernels = kernels_of(layer)

    def one(sums: Kernels, sample: tuple[Rows, Array]) -> tuple[Kernels, Float[Array, "t e"]]:
        row, slope = jax.tree.map(lambda leaf: leaf[None], sample)
        _, pull = jax.vjp(lambda w, x: run(text, with_kernels(layer, w), row.replace(x=x)), kernels, row.x)
        found, before = pull(slope)
        return jax.tree.map(lambda total, g: total + jnp.abs(g.astype(jnp.float32)), sums, found), before[0]

    nothing = {name: jnp.zeros(kernel.shape, jnp.float32) for name, kernel in kernels.items()}
    return jax.lax.scan(one, nothing, (rows, slope))
