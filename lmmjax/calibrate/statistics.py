"""What calibration finds out about a decoder layer: the inputs of its linears, and how it changes the stream."""

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from lmmjax.linears import SHARED


class LinearStatistics(struct.PyTreeNode):
    """One linear's inputs over the chosen tokens, in float32; what nobody asked for is None.

    `x_sq` is the mean square of every input, `gram` the mean of x xᵀ, whose diagonal it is. `gradient` is the mean
    over samples of the size of the loss's gradient by every weight.
    """

    x_sq: Float[Array, "in"]
    gram: Float[Array, "in in"] | None = None
    gradient: Float[Array, "in out"] | None = None


class Traits(NamedTuple):
    """How a layer changes the stream, each a mean over tokens; NaN where there are no such tokens.

    `attn_drift` and `mlp_drift` are 1 - cos of what goes into a sublayer and what the stream is behind it. The other
    three are 1 - cos of two tokens of the layer's output, a mean over pairs: two visual ones, two of text, one of each.
    """

    attn_drift: Float[Array, ""]
    mlp_drift: Float[Array, ""]
    visual_spread: Float[Array, ""]
    text_spread: Float[Array, ""]
    cross_spread: Float[Array, ""]


class LayerStatistics(struct.PyTreeNode):
    """A layer's statistics: those of each linear by its name, and the layer's traits."""

    linears: dict[str, LinearStatistics]
    traits: Traits

    def __getitem__(self, linear: str) -> LinearStatistics:
        return self.linears[linear]

    def with_gradients(self, sizes: Mapping[str, Float[Array, "in out"]]) -> "LayerStatistics":
        """Returns the statistics with each linear's gradients."""
        return self.replace(linears={name: one.replace(gradient=sizes[name]) for name, one in self.linears.items()})

    def without_grams(self) -> "LayerStatistics":
        """Returns the statistics without what takes most memory."""
        return self.replace(linears={name: one.replace(gram=None) for name, one in self.linears.items()})


def spread(fed: dict[str, LinearStatistics]) -> dict[str, LinearStatistics]:
    """Returns the statistics of all seven linears from those of the four inputs; what is shared is one array."""
    return {name: fed[first] for first, names in SHARED.items() for name in names}


def to_arrays(stats: LayerStatistics) -> dict[str, Array]:
    """Returns the statistics as named arrays, what linears share once; without gradients."""
    fed = {name: stats[name] for name in SHARED}
    arrays = {f"{name}.x_sq": one.x_sq for name, one in fed.items() if one.gram is None}
    arrays |= {f"{name}.gram": one.gram for name, one in fed.items() if one.gram is not None}
    return {**arrays, "traits": jnp.stack(stats.traits)}


def from_arrays(arrays: dict[str, Array]) -> LayerStatistics:
    """Returns the statistics that `to_arrays` took apart."""
    fed = {}
    for name in SHARED:
        gram = arrays.get(f"{name}.gram")
        fed[name] = LinearStatistics(arrays[f"{name}.x_sq"] if gram is None else jnp.diagonal(gram), gram)
    return LayerStatistics(spread(fed), Traits(*arrays["traits"]))
