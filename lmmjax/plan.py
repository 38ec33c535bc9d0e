"""The Plan: what compression does to every decoder layer. Searches find it, pruning and the cache consume it."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kernels.quantize import PACKED_BITS
from lmmjax.config import LINEARS, TextConfig
from lmmjax.errors import InputError

BITS = (16, *PACKED_BITS)
"""The widths of keys and values; 16 is exact, in the cache's dtype."""
DTYPES = ("bfloat16", "float16", "float32")
VERSION = 1


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

    def __post_init__(self):
        if self.group < 1 or self.window < 0 or self.window % self.group:
            raise InputError(
                f"cache: got group {self.group}, window {self.window}; expected a group of at least 1 and a window that"
                " is a multiple of it"
            )
        if self.dtype not in DTYPES:
            raise InputError(f"cache: got dtype {self.dtype!r}, expected one of {', '.join(DTYPES)}")


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

    def __post_init__(self):
        if self.samples < 1 or self.seed < 0:
            raise InputError(f"calibration: got {self.samples} samples and seed {self.seed}, expected >= 1 and >= 0")


@dataclasses.dataclass(frozen=True)
class Plan:
    """One compression of a model: a LayerPlan a layer, the pruning score and the cache format."""

    layers: tuple[LayerPlan, ...]
    score: str = "lognorm"
    calibration: Calibration = Calibration()
    cache: CacheFormat = CacheFormat()
    version: int = VERSION

    @property
    def prunes(self) -> bool:
        return any(count for layer in self.layers for count in layer.drop.values())

    def sparsity(self, text: TextConfig) -> float:
        """Returns the dropped share of the prunable weights, weighted by parameters."""
        outputs = {name: text.linear_shape(name)[1] for name in LINEARS}
        dropped = sum(count * outputs[name] for layer in self.layers for name, count in layer.drop.items())
        return dropped / text.prunable

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
        """Returns the plan that `to_json` wrote.

        Raises:
            InputError: unknown or missing keys, values of a wrong type or out of range, or another version.
        """
        try:
            raw = _mapping(json.loads(text), "plan")
        except json.JSONDecodeError as error:
            raise InputError(f"plan: not JSON ({error})") from error
        if raw.get("version") != VERSION:
            raise InputError(f"plan: got version {raw.get('version')!r}, this lmmjax reads {VERSION}")
        if not isinstance(raw.get("layers"), list):
            raise InputError("plan.layers: expected a list, one entry a decoder layer")
        built: dict[str, Any] = {
            "layers": tuple(_build(LayerPlan, x, f"layers[{i}]") for i, x in enumerate(raw["layers"]))
        }
        for name, kind in (("calibration", Calibration), ("cache", CacheFormat)):
            built |= {name: _build(kind, raw[name], name)} if name in raw else {}
        return _build(cls, {**raw, **built}, "plan")

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        try:
            return cls.from_json(Path(path).read_text())
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not a text file"
            raise InputError(f"--plan: cannot read {path} ({reason})") from error


def uniform(text: TextConfig, *, drop: Mapping[str, int] | None = None, bits: int = 16, **settings: Any) -> Plan:
    """Returns the plan that treats every layer alike; `settings` are the Plan's other fields."""
    layer = LayerPlan(bits, bits, dict(drop) if drop else dict.fromkeys(LINEARS, 0))
    return Plan((layer,) * text.layers, **settings)


def _build(kind: type, raw: Any, where: str) -> Any:
    """Returns the dataclass of these values, after a look at their names and types."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if unknown := set(_mapping(raw, where)) - set(fields):
        raise InputError(f"{where}: unknown {', '.join(sorted(unknown))}; expected {', '.join(fields)}")
    for name, value in raw.items():
        expected = fields[name].type
        # type(), for a bool is an int to isinstance
        if expected in (int, bool, str) and type(value) is not expected:
            raise InputError(f"{where}.{name}: got {value!r}, expected {getattr(expected, '__name__', expected)}")
    for name, count in _mapping(raw.get("drop", {}), f"{where}.drop").items():
        if type(count) is not int:
            raise InputError(f"{where}.drop.{name}: got {count!r}, expected int")
    return kind(**raw)


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise InputError(f"{where}: got {value!r}, expected an object")
    return value
