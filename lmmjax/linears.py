"""The seven prunable kernels of a decoder layer in its tree of parameters."""

from collections.abc import Iterable, Mapping

from jaxtyping import Array, Float

from lmmjax.config import LINEARS
from lmmjax.llava import Params

SUBLAYERS = {"attn": ("q", "k", "v", "o"), "mlp": ("gate", "up", "down")}
"""The linears of each part of a layer's tree; one after the other in the order of LINEARS."""
SHARED = {"q": ("q", "k", "v"), "o": ("o",), "gate": ("gate", "up"), "down": ("down",)}
"""The linears that are fed the same, by the first of each: a layer has four inputs and seven linears."""


def named(row: Iterable[int]) -> dict[str, int]:
    """Returns a row of a per-linear table as plain numbers by name."""
    return {name: int(number) for name, number in zip(LINEARS, row, strict=True)}


def kernel_of(layer: Params, linear: str) -> Float[Array, "in out"]:
    """Returns a linear's weights."""
    return layer[part_of(linear)][linear]["kernel"]


def kernels_of(layer: Params) -> dict[str, Float[Array, "in out"]]:
    """Returns all seven linears' weights by name, in the order of LINEARS."""
    return {name: kernel_of(layer, name) for name in LINEARS}


def with_kernels(layer: Params, kernels: Mapping[str, Float[Array, "in out"]]) -> Params:
    """Returns the layer with these kernels; all that is not on the way to one of them stays the same object."""
    for name, kernel in kernels.items():
        part = part_of(name)
        layer = layer | {part: layer[part] | {name: layer[part][name] | {"kernel": kernel}}}
    return layer


def path_of(index: int, linear: str) -> str:
    """Returns the dotted name of a linear's weights among all parameters."""
    return f"text.layers_{index}.{part_of(linear)}.{linear}.kernel"


def part_of(linear: str) -> str:
    """Returns the part of a layer's tree that holds a linear."""
    return next(part for part, names in SUBLAYERS.items() if linear in names)
