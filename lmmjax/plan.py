"""The Plan: what compression does to every decoder layer. Searches find it, pruning and the cache consume it."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lmmjax.config import LINEARS, TextConfig
from lmmjax.errors import InputError

BITS = (16, 8, 4, 2)


@dataclasses.dataclass(frozen=True)
class CacheFormat:
    """How quantized layers keep their tokens: groups of `group`, at least the latest `window` tokens exact.

    `dtype` is that of exact tokens, and what "dense bytes" means. `quantize_prefill` says whether the prompt's
    own queries see rounded keys and values, as the decode steps after them do.
    """

    group: int = 32
    window: int = 0
    dtype: str = "bfloat16"
    quantize_prefill: bool = True


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """One decoder layer: bits of its keys and values, and inputs dropped in each output row of its linears.

    Counts, not ratios: they are what a mask realizes, and sums of them are exact.
    """

    key_bits: int = 16
    value_bits: int = 16
    drop: Mapping[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(LINEARS, 0))


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Where the scores' statistics come from, so that a plan can be replayed on the dense model."""

    data: str = "easy-vqa"
    samples: int = 128
    tokens: str = "all"
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Plan:
    """One compression of a model: a LayerPlan a layer, the pruning score and the cache format."""

    layers: tuple[LayerPlan, ...]
    score: str = "lognorm"
    calibration: Calibration = Calibration()
    cache: CacheFormat = CacheFormat()

    @property
    def prunes(self) -> bool:
        return any(count for layer in self.layers for count in layer.drop.values())

    def sparsity(self, text: TextConfig) -> float:
        """Returns the dropped share of the prunable weights, weighted by parameters."""
        shapes = {name: text.linear_shape(name) for name in LINEARS}
        dropped = sum(count * shapes[name][1] for layer in self.layers for name, count in layer.drop.items())
        return dropped / (len(self.layers) * sum(n_in * n_out for n_in, n_out in shapes.values()))

    def check(self, text: TextConfig) -> "Plan":
        """Returns the plan itself if it fits a model of this shape; else raises InputError."""
        if len(self.layers) != text.layers:
            raise InputError(f"plan: got {len(self.layers)} layers, expected the model's {text.layers}")
        for index, layer in enumerate(self.layers):
            for side, bits in (("key_bits", layer.key_bits), ("value_bits", layer.value_bits)):
                if bits not in BITS:
                    raise InputError(f"plan: layers[{index}].{side} is {bits!r}, expected one of {BITS}")
            if set(layer.drop) != set(LINEARS):
                raise InputError(f"plan: layers[{index}].drop names {sorted(layer.drop)}, expected {sorted(LINEARS)}")
            for name, count in layer.drop.items():
                width = text.linear_shape(name)[0]
                if not 0 <= count <= width:
                    raise InputError(f"plan: layers[{index}].drop.{name} is {count}, expected 0 to {width}")
        return self

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Returns the plan that `to_json` wrote; unknown or missing keys and wrong types are an InputError."""
        try:
            raw = json.loads(text)
            layers = tuple(_build(LayerPlan, layer, f"layers[{i}]") for i, layer in enumerate(raw.pop("layers")))
            parts = {"calibration": Calibration, "cache": CacheFormat}
            built = {name: _build(kind, raw.pop(name), name) for name, kind in parts.items() if name in raw}
            return _build(cls, {**raw, **built, "layers": layers}, "plan")
        except (json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
            raise InputError(f"plan: not a plan.json ({type(error).__name__}: {error})") from error

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        try:
            return cls.from_json(Path(path).read_text())
        except OSError as error:
            raise InputError(f"--plan: cannot read {path} ({error.strerror})") from error


def uniform(text: TextConfig, *, drop: Mapping[str, int] | None = None, bits: int = 16, **settings: Any) -> Plan:
    """Returns the plan that treats every layer alike; `settings` are the Plan's other fields."""
    layer = LayerPlan(bits, bits, dict(drop) if drop else dict.fromkeys(LINEARS, 0))
    return Plan((layer,) * text.layers, **settings)


def _build(kind: type, raw: Mapping[str, Any], where: str) -> Any:
    unknown = set(raw) - _names(dataclasses.fields(kind))
    if unknown:
        raise InputError(f"{where}: unknown {', '.join(sorted(unknown))}; expected a plan.json of this version")
    return kind(**raw)


def _names(fields: Iterable[dataclasses.Field]) -> set[str]:
    return {field.name for field in fields}
