"""A model as what can be held and what is fetched: its outer parts in memory, its decoder layers one at a time."""

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from lmmjax import checkpoint, weights
from lmmjax.config import LlavaConfig
from lmmjax.llava import Params


@dataclasses.dataclass(frozen=True)
class Layered:
    """`outer` is {"vision", "projector", "text"} without decoder layers, `layer(i)` the parameters of one of these."""

    config: LlavaConfig
    outer: Params
    layer: Callable[[int], Params]

    def digest(self) -> str:
        """Returns a short hash of the config and of every weight; of a stored model it reads each layer once."""
        found = hashlib.sha256(repr(self.config).encode())
        for part in (self.outer, *map(self.layer, range(self.config.text.layers))):
            for leaf in jax.tree.leaves(part):
                found.update(f"{leaf.dtype}{leaf.shape}".encode())
                found.update(np.asarray(leaf).tobytes())
        return found.hexdigest()[:16]


def held(config: LlavaConfig, params: Params) -> Layered:
    """Returns a model in memory as one of layers."""
    text = {name: part for name, part in params["text"].items() if not name.startswith("layers_")}
    return Layered(config, {**params, "text": text}, lambda index: params["text"][f"layers_{index}"])


def stored(path: Path, config: LlavaConfig, dtype: str | None = None) -> Layered:
    """Returns a checkpoint's model; each call for a layer reads that layer from the disk.

    `dtype` as in `checkpoint.load`.
    """
    reader, cast = weights.Reader(path / "params"), dtype or checkpoint.own_dtype()
    names = list(reader.leaves)

    def read(chosen: list[str]) -> Params:
        return unflatten_dict({name: _on_device(leaf, cast) for name, leaf in reader.read(chosen).items()}, sep=".")

    def layer(index: int) -> Params:
        prefix = f"text.layers_{index}."
        return read([name for name in names if name.startswith(prefix)])["text"][f"layers_{index}"]

    return Layered(config, read([name for name in names if not name.startswith("text.layers_")]), layer)


def _on_device(leaf: np.ndarray, dtype: str | None) -> jax.Array:
    return jnp.asarray(leaf, dtype)
