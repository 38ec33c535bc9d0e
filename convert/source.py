"""Tensors on disk, read one at a time: safetensors or pytorch .bin, in one file or in shards."""

import abc
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from convert.names import Shape
from lmmjax.errors import InputError, first_line
from lmmjax.files import read_json

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class Source(abc.ABC):
    """One file of tensors. `tensors` is {name: (shape, dtype)}, known before any weight is read."""

    tensors: dict[str, tuple[Shape, str]]

    @abc.abstractmethod
    def read(self, name: str) -> np.ndarray: ...


class Safetensors(Source):
    """A safetensors file. It is opened anew for every tensor: one mapping would count, page by page, as memory."""

    def __init__(self, file: Path):
        self._file = file
        try:
            with safe_open(file, framework="np") as opened:
                self.tensors = {name: _described(opened.get_slice(name)) for name in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file} is damaged or cut short ({error}); download it again") from error

    def read(self, name: str) -> np.ndarray:
        with safe_open(self._file, framework="np") as opened:
            return opened.get_tensor(name)


class TorchFile(Source):
    """A pytorch .bin file, mapped into memory and unpickled with nothing but tensors allowed."""

    def __init__(self, file: Path):
        self._tensors = _torch_load(file)
        self.tensors = {
            name: (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            for name, tensor in self._tensors.items()
        }

    def read(self, name: str) -> np.ndarray:
        import torch

        tensor = self._tensors[name].detach().contiguous()
        if tensor.dtype == torch.bfloat16:  # NumPy has no bfloat16 of its own
            return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()


class Shards(Source):
    """Several sources as one."""

    def __init__(self, parts: Iterable[Source]):
        self._owners = {name: part for part in parts for name in part.tensors}
        self.tensors = {name: part.tensors[name] for name, part in self._owners.items()}

    def read(self, name: str) -> np.ndarray:
        return self._owners[name].read(name)


class Renamed(Source):
    """Some tensors of a source under other names: {new name: old name}."""

    def __init__(self, source: Source, names: Mapping[str, str]):
        self._source, self._names = source, names
        self.tensors = {new: source.tensors[old] for new, old in names.items()}

    def read(self, name: str) -> np.ndarray:
        return self._source.read(self._names[name])


class Arrays(Source):
    """Tensors that are in memory."""

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        self._arrays = arrays
        self.tensors = {name: (array.shape, str(array.dtype)) for name, array in arrays.items()}

    def read(self, name: str) -> np.ndarray:
        return self._arrays[name]


def open_source(directory: Path) -> Source:
    """Returns the weights in a directory; safetensors are preferred where both formats are there.

    Raises:
        InputError: no weights, a missing or damaged shard, or a .bin without torch to read it.
    """
    for name, kind in (("model.safetensors", Safetensors), ("pytorch_model.bin", TorchFile)):
        if (directory / f"{name}.index.json").exists():
            return joined({file.name: kind(file) for file in _shards(directory / f"{name}.index.json")})
        if (directory / name).exists():
            return kind(directory / name)
    raise InputError(f"{directory} holds no weights; expected model.safetensors or pytorch_model.bin, or their index")


def open_file(file: Path) -> Source:
    """Returns the tensors of one file, by its ending.

    Raises:
        InputError: no such file, one of another kind, a damaged one, or a .bin without torch to read it.
    """
    if not file.is_file():
        raise InputError(f"there is no file {file}; expected one of tensors, .safetensors or .bin")
    if file.suffix not in (".safetensors", ".bin"):
        raise InputError(f"{file}: expected a file of tensors, .safetensors or .bin")
    return Safetensors(file) if file.suffix == ".safetensors" else TorchFile(file)


def joined(parts: Mapping[str, Source]) -> Source:
    """Returns several sources as one; the keys are what messages call them.

    Raises:
        InputError: two of them have a tensor of the same name.
    """
    owners: dict[str, str] = {}
    for title, part in parts.items():
        for name in part.tensors:
            if (other := owners.setdefault(name, title)) != title:
                raise InputError(f"{name} is both in {other} and in {title}; expected it in one of them alone")
    return Shards(parts.values())


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise InputError(f"{index}: no weight_map of file names; expected the index of a sharded checkpoint")
    shards = [index.parent / name for name in sorted(set(weight_map.values()))]
    if absent := [shard.name for shard in shards if not shard.exists()]:
        raise InputError(f"{index.parent}: missing {', '.join(absent)}, named in {index.name}; download again")
    return shards


def _described(part: Any) -> tuple[Shape, str]:
    dtype = str(part.get_dtype())
    return tuple(part.get_shape()), _DTYPES.get(dtype, dtype)


def _torch_load(file: Path) -> dict[str, Any]:
    try:
        import torch
    except ImportError as error:
        raise InputError(f"{file} needs torch to be read: pip install torch, or get safetensors instead") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, on storages
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        reason = first_line(error)[:150]
        raise InputError(f"{file} cannot be read safely ({reason}); download it again or get safetensors") from error
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in tensors.items()
    ):
        raise InputError(f"{file} holds more than named tensors; expected a model's state_dict")
    return tensors
