"""Merging a LoRA adapter, in the format of PEFT, into the weights that it was trained on.

Source: Hu et al., LoRA: low-rank adaptation of large language models, arXiv:2106.09685, section 4.1; the scale
alpha / sqrt(r) is Kalajdzievski's, arXiv:2312.03732.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np

from convert import DTYPES
from convert.names import PEFT_PREFIX, canonical
from convert.source import Source, open_file
from lmmjax.errors import InputError
from lmmjax.files import read_json

_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# Settings without a say in what is merged: which layers were trained is in the tensors' names.
_INERT = frozenset(
    "base_model_name_or_path revision task_type inference_mode target_modules exclude_modules layers_to_transform "
    "layers_pattern lora_dropout peft_type auto_mapping peft_version r lora_alpha use_rslora rank_pattern "
    "megatron_core runtime_config qalora_group_size".split()
)
# Settings with a say, and the values at which it is what is done here; any other setting must be off.
_REQUIRED = {"peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": (True, False, None, "gaussian")}
_OFF: tuple[Any, ...] = (None, False, "", [], {})


@dataclasses.dataclass(frozen=True)
class _Pair:
    """The names of a low-rank update's two factors: (r, in) and (out, r)."""

    a: str
    b: str


class Merged(Source):
    """A source whose adapted weights are W + scale * B A, computed in float32.

    They come out in `dtype`, or else in that of W.

    Raises:
        InputError: a setting that is not handled, a tensor that is no factor or whose weight is not there.
    """

    def __init__(self, source: Source, adapter: Path, dtype: str | None = None):
        directory = adapter if adapter.is_dir() else adapter.parent
        self._adapter = open_file(_file_of(adapter))
        self._source, self._settings = source, _read_settings(directory / "adapter_config.json")
        self._pairs = _pairs(self._adapter, source)
        self.tensors = {
            name: (shape, dtype or held) if name in self._pairs else (shape, held)
            for name, (shape, held) in source.tensors.items()
        }

    def read(self, name: str) -> np.ndarray:
        weight = self._source.read(name)
        if name not in self._pairs:
            return weight
        pair = self._pairs[name]
        a, b = (self._adapter.read(part).astype(np.float32) for part in (pair.a, pair.b))
        merged = weight.astype(np.float32) + self._scale(len(a)) * (b @ a)
        with np.errstate(over="ignore"):  # told where the weights are stored
            return merged.astype(self.tensors[name][1])

    def _scale(self, rank: int) -> np.float32:
        root = rank**0.5 if self._settings.get("use_rslora") else rank
        return np.float32(self._settings["lora_alpha"] / root)


def _file_of(adapter: Path) -> Path:
    if not adapter.is_dir():
        return adapter
    found = [adapter / name for name in _WEIGHTS if (adapter / name).exists()]
    if not found:
        raise InputError(f"--lora: {adapter} holds neither {' nor '.join(_WEIGHTS)}; expected an adapter of PEFT")
    return found[0]


def _read_settings(file: Path) -> dict[str, Any]:
    settings = read_json(file)
    problems = [
        f"{name} = {value!r}"
        for name, value in settings.items()
        if (value not in _REQUIRED[name] if name in _REQUIRED else name not in _INERT and value not in _OFF)
    ]
    if problems:
        raise InputError(f"{file}: {', '.join(problems)} is not handled; expected a plain LoRA without biases")
    alpha = settings.get("lora_alpha")
    if settings.get("peft_type") != "LORA" or type(alpha) not in (int, float):
        raise InputError(f"{file}: expected peft_type LORA and a number as lora_alpha, got {alpha!r}")
    return settings


def _pairs(adapter: Source, source: Source) -> dict[str, _Pair]:
    """Returns {the source's name: the factors of its update}."""
    factors = {_target(name): name for name in adapter.tensors}
    if len(factors) != len(adapter.tensors):
        twice = sorted(set(adapter.tensors) - set(factors.values()))
        raise InputError(f"--lora: {', '.join(twice[:5])}: a second factor of its weight; expected one of each")
    known = {canonical(name): name for name in source.tensors}
    targets = sorted({target for target, _ in factors})
    problems = [f"{target} has no weight in the model" for target in targets if target not in known]
    problems += [f"{target} has no lora_{side}" for target in targets for side in "AB" if (target, side) not in factors]
    if not problems:
        pairs = {known[target]: _Pair(factors[target, "A"], factors[target, "B"]) for target in targets}
        problems = [problem for name, pair in pairs.items() for problem in _misfits(name, pair, adapter, source)]
        if not problems and pairs:
            return pairs
    more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
    raise InputError(f"--lora: {'; '.join(problems[:5]) or 'the adapter holds no tensors'}{more}")


def _target(name: str) -> tuple[str, str]:
    """Returns a factor's weight under its llava-hf name, and "A" or "B"."""
    match = re.fullmatch(r"(.+)\.lora_([AB])(?:\.default)?\.weight", name.removeprefix(PEFT_PREFIX))
    if match is None:
        raise InputError(f"--lora: the adapter's tensor {name} is not handled; expected names ending in lora_A.weight")
    base = re.sub(r"^layers\.", "model.layers.", match[1])
    return canonical(f"{base}.weight") or base, match[2]


def _misfits(name: str, pair: _Pair, adapter: Source, source: Source) -> list[str]:
    (a, a_dtype), (b, b_dtype) = adapter.tensors[pair.a], adapter.tensors[pair.b]
    weight = source.tensors[name][0]
    if not len(a) == len(b) == len(weight) == 2 or (b[0], a[1]) != weight or a[0] != b[1]:
        return [f"{name} is {weight}, its factors are {a} and {b}"]
    return [f"{part} is {dtype}" for part, dtype in ((pair.a, a_dtype), (pair.b, b_dtype)) if dtype not in DTYPES]
