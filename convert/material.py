"""All that a conversion starts from, and the two checkpoints that are made of it, one tensor after the other."""

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from convert import writing
from convert.fit import assign, checked
from convert.names import EMBEDDING, LM_HEAD, slots, spelled
from convert.source import Source
from lmmjax import checkpoint
from lmmjax.config import LlavaConfig, from_hf
from lmmjax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Material:
    """The text of config.json, files to carry along, and the weights."""

    config: bytes
    carried: list[Path]
    weights: Source


def store(material: Material, target: Path, dtype: str | None = None) -> None:
    """Writes the lmmjax checkpoint `target`; without `dtype` every tensor keeps its own.

    Raises:
        InputError: the config and the weights do not fit, weights are not finite, or `target` exists.
    """
    config, names = _matched(material)
    with checkpoint.writer(target, material.config, material.carried) as leaves:
        for slot in tqdm(slots(config), desc="convert", unit="tensor", file=sys.stderr):
            leaves.add(slot.leaf, checked(slot, material.weights.read(names[slot.name]), dtype))


def store_hf(material: Material, target: Path, dtype: str | None = None) -> None:
    """Writes the ordinary Hugging Face checkpoint `target`; arguments and errors are those of `store`."""
    config, names = _matched(material)
    places = {slot.leaf: slot for slot in slots(config)}
    described = material.weights.tensors
    leaves = {
        leaf: jax.ShapeDtypeStruct(slot.our_shape, np.dtype(dtype or described[names[slot.name]][1]))
        for leaf, slot in places.items()
    }

    def read(wanted: Sequence[str]) -> Mapping[str, np.ndarray]:
        return {leaf: checked(places[leaf], material.weights.read(names[places[leaf].name]), dtype) for leaf in wanted}

    writing.write(target, json.loads(material.config), material.carried, leaves, read)


def _matched(material: Material) -> tuple[LlavaConfig, dict[str, str]]:
    """Returns the config, and which of the source's tensors is which weight."""
    config = from_hf(json.loads(material.config))
    names = assign(config, material.weights.tensors)
    if config.text.tied:
        head, embedding = (names.get(spelled(config, name)) for name in (LM_HEAD, EMBEDDING))
        _require_equal_copy(material.weights, head, embedding)
    return config, names


def _require_equal_copy(weights: Source, head: str | None, embedding: str | None) -> None:
    """A tied head that was saved a second time must be the embedding, or the model is not what it says."""
    if head is None or embedding is None:
        return
    if not np.array_equal(weights.read(head), weights.read(embedding)):
        raise InputError(f"{head} differs from the embedding, but config.json says they are tied")
