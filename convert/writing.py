"""An ordinary Hugging Face checkpoint, written about a layer at a time."""

import itertools
import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from tqdm import tqdm

from convert import SHARD_BYTES, shards
from convert.names import EMBEDDING, LM_HEAD, Slot, slots
from lmmjax import files
from lmmjax.config import LlavaConfig, from_hf
from lmmjax.errors import InputError
from lmmjax.llava import Params

Leaves = Mapping[str, jax.ShapeDtypeStruct]
Read = Callable[[Sequence[str]], Mapping[str, np.ndarray]]


def write_hf(params: Params, config: Mapping[str, Any], target: Path, carried: Iterable[Path] = ()) -> None:
    """Writes parameters and the dict of their config.json as an ordinary Hugging Face checkpoint.

    `carried` are the tokenizer's and preprocessor's files, copied under their own names. What transformers'
    model has and the forward pass never reads (the tower's post-norm and the layers behind the last feature)
    may be absent from `params`: it is written as the identity, or zeros.

    Raises:
        InputError: leaves are missing, unknown or of another shape than the config says, or `target` exists.
    """
    leaves: dict[str, Any] = dict(flatten_dict(params, sep="."))
    shapes = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in leaves.items()}
    write(target, config, carried, shapes, lambda names: {name: np.asarray(leaves[name]) for name in names})


def write(
    target: Path,
    raw: Mapping[str, Any],
    carried: Iterable[Path],
    leaves: Leaves,
    read: Read,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes the leaves that `read` gives by name as `write_hf` does; a config.json in `carried` stays verbatim.

    Unless it would be wrong: about the dtype of weights that were cast, or rows added to the vocabulary.
    """
    config = from_hf(raw)
    places = slots(config)
    require_fit(config, places, leaves)
    vocabulary = max(config.text.vocab, 0 if config.image_token is None else config.image_token + 1)
    entries = [_entry(slot, leaves, vocabulary) for slot in places]
    with files.atomic_directory(target) as temporary:
        tensors = (_grown(slot, tensor, vocabulary) for slot, tensor in _tensors(places, leaves, read))
        shards.write(
            temporary, entries, tqdm(tensors, "export", len(places), unit="tensor", file=sys.stderr), shard_bytes
        )
        for file in carried:
            shutil.copyfile(file, temporary / file.name)
        written = _with_dtype(raw if vocabulary == config.text.vocab else _with_vocabulary(raw, vocabulary), entries)
        if written != raw or not (temporary / "config.json").exists():
            (temporary / "config.json").write_text(json.dumps(written, indent=2))


def _tensors(places: Sequence[Slot], leaves: Leaves, read: Read) -> Iterator[tuple[Slot, np.ndarray]]:
    """Yields every tensor in Hugging Face's layout, one layer after the other."""
    for _, layer in itertools.groupby(places, key=lambda slot: slot.leaf.split(".")[:2]):
        part = list(layer)
        found = read([slot.leaf for slot in part if slot.leaf in leaves])
        for slot in part:
            yield slot, slot.to_theirs(found[slot.leaf]) if slot.leaf in found else _stand_in(slot, leaves)


def require_fit(config: LlavaConfig, places: Sequence[Slot], leaves: Leaves) -> None:
    """Raises InputError unless the leaves are those of the places, in their shapes; what no model reads may lack."""
    shapes = {slot.leaf: slot.our_shape for slot in places}
    unread = {slot.leaf for slot in places if _is_unread(config, slot.leaf)}
    problems = [
        *(f"{name} is missing" for name in shapes if name not in leaves and name not in unread),
        *(f"{name} is unknown" for name in leaves if name not in shapes),
        *(
            f"{name} is {leaf.shape}, expected {shapes[name]}"
            for name, leaf in leaves.items()
            if leaf.shape != shapes.get(name, leaf.shape)
        ),
    ]
    if problems:
        raise InputError(f"the weights do not fit config.json: {'; '.join(problems[:10])} ({len(problems)} problems)")


def _is_unread(config: LlavaConfig, leaf: str) -> bool:
    """Returns whether only transformers' model has this weight, and no forward pass needs it."""
    part, name = leaf.split(".")[:2]
    if part != "vision":
        return False
    behind = name.startswith("layers_") and int(name.removeprefix("layers_")) >= max(config.tower.feature_layers)
    return name == "post_norm" or behind


def _stand_in(slot: Slot, leaves: Leaves) -> np.ndarray:
    return np.full(slot.shape, float(slot.leaf.endswith(".scale")), _dtype(slot, leaves))


def _dtype(slot: Slot, leaves: Leaves) -> np.dtype:
    return np.dtype(leaves[slot.leaf].dtype if slot.leaf in leaves else leaves["vision.class_embed"].dtype)


def _entry(slot: Slot, leaves: Leaves, vocabulary: int) -> shards.Entry:
    shape = (vocabulary, *slot.shape[1:]) if slot.name in (EMBEDDING, LM_HEAD) else slot.shape
    return shards.Entry(slot.name, shape, _dtype(slot, leaves))


def _grown(slot: Slot, tensor: np.ndarray, vocabulary: int) -> np.ndarray:
    """Gives an image token beyond the vocabulary (the original LLaVA's) its row, as transformers demands.

    The rows are the mean of the others: such a logit is the mean of all, so it is never the greatest.
    """
    if slot.name not in (EMBEDDING, LM_HEAD) or len(tensor) == vocabulary:
        return tensor
    mean = tensor.mean(axis=0, keepdims=True, dtype=np.float32).astype(tensor.dtype)
    return np.concatenate([tensor, np.repeat(mean, vocabulary - len(tensor), axis=0)])


def _with_vocabulary(raw: Mapping[str, Any], vocabulary: int) -> dict[str, Any]:
    whole = {**raw, "text_config": {**raw.get("text_config", {}), "vocab_size": vocabulary}}
    return {**whole, "vocab_size": vocabulary} if "vocab_size" in raw else whole


def _with_dtype(raw: Mapping[str, Any], entries: Sequence[shards.Entry]) -> dict[str, Any]:
    """Returns the config with the dtype that most weights have, where it names one that none has.

    transformers loads as the config says, so weights cast to bfloat16 would come back as float16.
    """
    bytes_of: Counter[str] = Counter()
    for entry in entries:
        bytes_of[str(entry.dtype)] += entry.nbytes
    if raw.get("dtype", raw.get("torch_dtype")) in (None, *bytes_of):
        return dict(raw)
    return _renamed_dtype(raw, bytes_of.most_common(1)[0][0])


def _renamed_dtype(part: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Returns a config, its parts included, with this dtype wherever it names one."""
    named = {key: dtype for key in ("dtype", "torch_dtype") if part.get(key)}
    inner = {
        key: _renamed_dtype(value, dtype) for key, value in part.items() if key in ("vision_config", "text_config")
    }
    return {**part, **inner, **named}
