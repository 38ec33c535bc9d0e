"""The seven prunable kernels of a decoder layer in its tree of parameters."""

from collections.abc import Mapping

from jaxtyping import Array, Float

from lmmjax.llava import Params

_ATTENTION = ("q", "k", "v", "o")


def kernel_of(layer: Params, linear: str) -> Float[Array, "in out"]:
    """Returns a linear's weights."""
    return layer[_part(linear)][linear]["kernel"]


def with_kernels(layer: Params, kernels: Mapping[str, Float[Array, "in out"]]) -> Params:
    """Returns the layer with these kernels; all that is not on the way to one of them stays the same object."""
    for name, kernel in kernels.items():
        part = _part(name)
        layer = layer | {part: layer[part] | {name: layer[part][name] | {"kernel": kernel}}}
    return layer


def _part(linear: str) -> str:
    return "attn" if linear in _ATTENTION else "mlp"


def path_of(index: int, linear: str) -> str:
    """Returns the dotted name of a linear's weights among all parameters."""
    return f"text.layers_{index}.{_part(linear)}.{linear}.kernel"
