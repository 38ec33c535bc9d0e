"""Packed linears of the same activations as one: a decode step then has four products a layer in the place of seven.

For a model that only runs: all that prunes, packs or measures looks for each linear under its own name.
"""

import jax
from jax.core import Tracer

from kernels.weights import Matrix
from kernels.weights.join import joined
from lmmjax.config import TextConfig
from lmmjax.llava import Params

TOGETHER = {"attn": ("q", "k", "v"), "mlp": ("gate", "up")}
"""Linears of the same activations, by the part of a layer; as `layers.linears` names them."""


def join_linears(text: TextConfig, params: Params) -> Params:
    """Returns params in which q, k and v, and gate and up, are one linear where they are packed alike.

    Consumes what it joins, layer by layer: a device that just holds the model has no room for it twice.
    """
    layers = {f"layers_{index}": _joined(params["text"][f"layers_{index}"]) for index in range(text.layers)}
    return params | {"text": params["text"] | layers}


def _joined(layer: Params) -> Params:
    for part, names in TOGETHER.items():
        kernels = [layer[part][name]["kernel"] for name in names]
        if not all(isinstance(kernel, Matrix) for kernel in kernels):
            continue
        if (kernel := _join(kernels)) is not None:
            _free(kernels)
            others = {name: leaf for name, leaf in layer[part].items() if name not in names}
            layer = layer | {part: others | {"_".join(names): {"kernel": kernel}}}
    return layer


def _free(kernels: list[Matrix]) -> None:
    for array in jax.tree.leaves(kernels):
        if not isinstance(array, Tracer):  # only shapes are asked for, which hold nothing
            array.delete()


_join = jax.jit(joined)
