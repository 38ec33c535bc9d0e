"""Writes safetensors one tensor at a time: a header of names, shapes and offsets, then the bytes.

The library's own writer wants a whole file's tensors in memory. Source: the format's description,
https://github.com/huggingface/safetensors#format.
"""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from convert.names import Shape

_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int32": "I32", "int8": "I8", "uint8": "U8"}


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor that is going to be written."""

    name: str
    shape: Shape
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize


def write(
    directory: Path, entries: Sequence[Entry], tensors: Iterable[np.ndarray], most: int, stem: str = "model"
) -> None:
    """Writes STEM.safetensors, or shards of at most `most` bytes and their index; tensors in the entries' order."""
    shards = list(_split(entries, most))
    stream = iter(tensors)
    weight_map = {}
    for number, shard in enumerate(shards):
        suffix = f"-{number + 1:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        file = directory / f"{stem}{suffix}.safetensors"
        with open(file, "xb") as out:
            out.write(_header(shard))
            for entry in shard:
                out.write(np.ascontiguousarray(_matching(entry, next(stream))).tobytes())
        weight_map.update({entry.name: file.name for entry in shard})
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(entry.nbytes for entry in entries)}, "weight_map": weight_map}
        (directory / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=1))


def _split(entries: Sequence[Entry], most: int) -> Iterator[list[Entry]]:
    shard: list[Entry] = []
    for entry in entries:
        if shard and sum(held.nbytes for held in shard) + entry.nbytes > most:
            yield shard
            shard = []
        shard.append(entry)
    yield shard


def _header(entries: Sequence[Entry]) -> bytes:
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        start, end = end, end + entry.nbytes
        fields[entry.name] = {
            "dtype": _DTYPES[str(entry.dtype)],
            "shape": list(entry.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data are aligned
    return len(text).to_bytes(8, "little") + text


def _matching(entry: Entry, tensor: np.ndarray) -> np.ndarray:
    if (tensor.shape, tensor.dtype) != (entry.shape, entry.dtype):
        raise AssertionError(f"{entry.name} is {tensor.shape} {tensor.dtype}, announced as {entry}")
    return tensor
