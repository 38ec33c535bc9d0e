"""Linears of the same activations as one: a decode step then has four products a layer in the place of seven.

For a model that only runs: all that prunes, packs or measures looks for each linear under its own name.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax.core import Tracer

from kernels.gpu import device
from kernels.weights import Matrix
from kernels.weights.join import joined
from lmmjax.config import TextConfig
from lmmjax.layers import joint
from lmmjax.linears import SHARED, kernel_of, part_of
from lmmjax.llava import Params


def join_linears(text: TextConfig, params: Params) -> Params:
    """Returns params in which q, k and v, and gate and up, are one linear where they are packed alike.

    So are plain kernels on a GPU, where a short product takes hardly less time than a longer one.
    Consumes what it joins, layer by layer: a device that just holds the model has no room for it twice.
    """
    layers = {f"layers_{index}": _joined(params["text"][f"layers_{index}"]) for index in range(text.layers)}
    return params | {"text": params["text"] | layers}


def _joined(layer: Params) -> Params:
    for first, names in SHARED.items():
        kernels, part = [kernel_of(layer, name) for name in names], part_of(first)
        if len(names) == 1 or not all(isinstance(kernel, Matrix) or _plain(kernel) for kernel in kernels):
            continue
        if (kernel := _join(kernels)) is not None:
            _free(kernels)
            others = {name: leaf for name, leaf in layer[part].items() if name not in names}
            layer = layer | {part: others | {joint(names): {"kernel": kernel}}}
    return layer


def _plain(kernel: Any) -> bool:
    return device.current() is not None and isinstance(kernel, jax.Array)


def _free(kernels: Sequence[Any]) -> None:
    for array in jax.tree.leaves(kernels):
        if not isinstance(array, Tracer):  # only shapes are asked for, which hold nothing
            array.delete()


_join = jax.jit(joined)
