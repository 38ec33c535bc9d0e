"""A packed checkpoint as safetensors that others can read: arrays under Hugging Face's names, and what they are.

A weight that is packed lies as NAME.values, and NAME.mask, NAME.scales, NAME.starts and NAME.order where it has them;
packed.json says of each NAME its kind, inputs, bits and group. All others lie under their own names. The layout is in
docs/weights.md.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from convert import SHARD_BYTES, shards
from convert.names import Slot, slots
from convert.writing import require_fit
from kernels.weights import Matrix, facts
from lmmjax import checkpoint, files, weights
from lmmjax.config import from_hf


def export_packed(source: Path, target: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes the lmmjax checkpoint `source` as the directory `target`, a tensor in memory.

    Raises:
        InputError: `source` is no whole checkpoint or its weights do not fit its config, or `target` exists.
    """
    checkpoint.describe(source)
    reader = weights.Reader(source / "params")
    leaves = reader.leaves
    config = from_hf(files.read_json(source / "config.json"))
    known = slots(config)
    require_fit(config, known, leaves)
    places = [slot for slot in known if slot.leaf in leaves]
    with files.atomic_directory(target) as temporary:
        entries = [entry for slot in places for entry in _entries(slot, leaves)]
        shards.write(temporary, entries, _tensors(places, reader), shard_bytes, "packed")
        (temporary / "packed.json").write_text(json.dumps(_facts(places, leaves), indent=1))
        for file in (source / "config.json", *checkpoint.carried_files(source)):
            shutil.copyfile(file, temporary / file.name)


def _entries(slot: Slot, leaves: Mapping[str, Any]) -> list[shards.Entry]:
    leaf = leaves[slot.leaf]
    if not isinstance(leaf, Matrix):
        return [shards.Entry(slot.name, slot.shape, np.dtype(leaf.dtype))]
    return [
        shards.Entry(f"{slot.name}.{field}", array.shape, np.dtype(array.dtype))
        for field, array in facts.arrays(leaf).items()
    ]


def _tensors(places: Sequence[Slot], reader: weights.Reader) -> Iterator[np.ndarray]:
    for slot in places:
        leaf = reader.read([slot.leaf])[slot.leaf]
        if isinstance(leaf, Matrix):  # which lies by output, as Hugging Face's weights do
            yield from map(np.asarray, facts.arrays(leaf).values())
        else:
            yield slot.to_theirs(leaf)


def _facts(places: Sequence[Slot], leaves: Mapping[str, Any]) -> dict[str, Any]:
    named = ((slot.name, leaves[slot.leaf]) for slot in places)
    return {name: facts.described(leaf) for name, leaf in named if isinstance(leaf, Matrix)}
