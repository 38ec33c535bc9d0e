"""The Plan: what compression does to every decoder layer. Searches find it, pruning and the cache consume it."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kernels.quantize import PACKED_BITS, Quantizer
from kernels.stores.base import Side
from lmmjax.config import LINEARS, TextConfig
from lmmjax.errors import InputError

BITS = (16, *PACKED_BITS)
"""The widths of keys and values; 16 is exact, in the cache's dtype."""
CHOICES = {
    "key_axis": ("tokens", "channels"),
    "visual_values": ("tokens", "channels"),
    "dtype": ("bfloat16", "float16", "float32"),
    "metadata": ("float16", "float8"),
    "keys": ("after_rope", "before_rope"),
    "rotate_values": ("no", "online", "folded"),
    "codebook": ("uniform", "normal"),
}
"""What each field of a CacheFormat may say."""
MOST = 1 << 16
"""No format speaks of more tokens or channels than this."""
VERSION = 3


@dataclasses.dataclass(frozen=True)
class CacheFormat:
    """How quantized layers keep their tokens, whatever their bits. The defaults are KIVI's scheme without a window.

    Args:
        group, value_group: members of a group of keys and of values (None: as keys). Along channels, the largest
            common divisor with head_dim.
        key_axis: what the keys' groups run along: tokens (a scale a channel) or channels (a scale a token).
        visual_values: the same for the values of image tokens; text's run along channels.
        window: at least so many of the latest tokens are exact; a multiple of the group.
        sinks: so many of the first tokens are exact.
        dtype: that of exact tokens, and what "dense bytes" means.
        metadata: that of groups' spans and zeros.
        keys: whether keys are quantized before or after RoPE.
        rotate_keys: whether queries and keys are turned by a Hadamard matrix, after RoPE.
        rotate_values: whether values are: "folded" into the weights of v and o, or "online", which leaves pruned
            weights their zeros.
        clip: whether each group's range is narrowed to where the squared error is least.
        codebook: even levels, or those that suit normal values.
        quantize_prefill: whether the prompt's own queries see rounded keys and values, as decode steps do.
    """

    group: int = 32
    value_group: int | None = None
    key_axis: str = "tokens"
    visual_values: str = "channels"
    window: int = 0
    sinks: int = 0
    dtype: str = "bfloat16"
    metadata: str = "float16"
    keys: str = "after_rope"
    rotate_keys: bool = False
    rotate_values: str = "no"
    clip: bool = False
    codebook: str = "uniform"
    quantize_prefill: bool = True

    def __post_init__(self):
        if self.group < 1 or self.window < 0 or self.window % self.group:
            raise InputError(
                f"cache: got group {self.group}, window {self.window}; expected a group of at least 1 and a window that"
                " is a multiple of it"
            )
        if self.sinks < 0 or (self.value_group is not None and self.value_group < 1):
            raise InputError(
                f"cache: got sinks {self.sinks}, value_group {self.value_group}; expected >= 0 and >= 1 (or null)"
            )
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise InputError(f"cache: got {name} {getattr(self, name)!r}, expected one of {', '.join(known)}")
        if max(self.group, self.value_group or 1, self.sinks, self.window) > MOST:
            raise InputError(f"cache: group, value_group, sinks and window: expected at most {MOST} each")
        if self.clip and self.codebook == "normal":
            raise InputError("cache: clip narrows ranges, of which codebook normal has none; choose one of them")
        if self.rotate_keys and self.keys == "before_rope":
            raise InputError("cache: rotate_keys turns keys after RoPE, but keys is before_rope; choose one of them")

    @property
    def settled_together(self) -> int:
        """Tokens that a capacity is a multiple of: whole groups of whatever runs along tokens."""
        along = [self.group] if self.key_axis == "tokens" else []
        along += [self.value_group or self.group] if self.visual_values == "tokens" else []
        return math.lcm(*along)

    def keeps_apart(self, side: Side, bits: int, visual_bits: int) -> bool:
        """Returns whether image tokens of these widths are kept otherwise than text."""
        return bits != visual_bits or (side == "values" and self.visual_values != "channels" and bits < 16)

    def key_quantizer(self, head_dim: int) -> Quantizer:
        """Returns how keys of this many channels are rounded."""
        return self._quantizer(self.key_axis, self.group, head_dim)

    def value_quantizer(self, head_dim: int, visual: bool = False) -> Quantizer:
        """Returns how values of this many channels are rounded, those of image tokens or of text."""
        axis = self.visual_values if visual else "channels"
        return self._quantizer(axis, self.value_group or self.group, head_dim)

    def _quantizer(self, axis: Any, group: int, head_dim: int) -> Quantizer:
        members = group if axis == "tokens" else math.gcd(group, head_dim)
        options: Any = {name: getattr(self, name) for name in ("clip", "codebook", "metadata")}
        return Quantizer(axis, members, **options)


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """One decoder layer: bits of its keys and values, and inputs dropped in each output row of its linears.

    Image tokens have bits of their own where `visual_key_bits` or `visual_value_bits` say so; None: as text.
    Counts, not ratios: they are what a mask realizes, and sums of them are exact.
    """

    key_bits: int = 16
    value_bits: int = 16
    drop: Mapping[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(LINEARS, 0))
    visual_key_bits: int | None = None
    visual_value_bits: int | None = None

    def widths(self, side: Side) -> tuple[int, int]:
        """Returns the bits of text's keys or values, and of image tokens'."""
        keys, values = (self.key_bits, self.visual_key_bits), (self.value_bits, self.visual_value_bits)
        text, visual = keys if side == "keys" else values
        return text, text if visual is None else visual


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
    """One compression of a model: a LayerPlan a layer, the pruning score and the cache format.

    `made_by` is the command that pruned where the score and the calibration do not say all: in sequence, with weights
    updated, in a pattern. Such a plan says what a checkpoint is, and is not replayed.
    """

    layers: tuple[LayerPlan, ...]
    score: str = "lognorm"
    calibration: Calibration = Calibration()
    cache: CacheFormat = CacheFormat()
    made_by: str | None = None
    version: int = VERSION

    @property
    def prunes(self) -> bool:
        return any(count for layer in self.layers for count in layer.drop.values())

    @property
    def splits_images(self) -> bool:
        """Whether some layer keeps image tokens otherwise than text."""
        return any(
            self.cache.keeps_apart(side, *layer.widths(side)) for layer in self.layers for side in ("keys", "values")
        )

    def sparsity(self, text: TextConfig) -> float:
        """Returns the dropped share of the prunable weights, weighted by parameters."""
        return sum(text.dropped(layer.drop) for layer in self.layers) / text.prunable

    def check(self, text: TextConfig) -> "Plan":
        """Returns the plan itself if it fits a model of this shape; else raises InputError."""
        if len(self.layers) != text.layers:
            raise InputError(f"plan: got {len(self.layers)} layers, expected the model's {text.layers}")
        self._check_groups(text.head_dim)
        for index, layer in enumerate(self.layers):
            for side in ("key_bits", "value_bits", "visual_key_bits", "visual_value_bits"):
                bits = getattr(layer, side)
                if bits not in BITS and not (side.startswith("visual") and bits is None):
                    raise InputError(f"plan: layers[{index}].{side} is {bits!r}, expected one of {BITS}")
            if set(layer.drop) != set(LINEARS):
                raise InputError(f"plan: layers[{index}].drop names {sorted(layer.drop)}, expected {sorted(LINEARS)}")
            for name, count in layer.drop.items():
                width = text.linear_shape(name)[0]
                if not 0 <= count <= width:
                    raise InputError(f"plan: layers[{index}].drop.{name} is {count}, expected 0 to {width}")
            if self.cache.rotate_values == "folded" and (layer.drop["v"] or layer.drop["o"]):
                raise InputError(
                    f"plan: layers[{index}].drop takes weights of v or o, which cache.rotate_values folded fills again;"
                    " use online"
                )
        return self

    def _check_groups(self, head_dim: int) -> None:
        """Raises InputError for groups along channels so small that their metadata outweighs the codes."""
        sides = {"group": self.cache.key_quantizer(head_dim), "value_group": self.cache.value_quantizer(head_dim)}
        for name, quantizer in sides.items():
            asked = self.cache.value_group or self.cache.group if name == "value_group" else self.cache.group
            if quantizer.axis == "channels" and quantizer.group < min(asked, head_dim, 4):
                raise InputError(
                    f"plan: cache.{name} {asked} and head_dim {head_dim} share no divisor above {quantizer.group};"
                    " give a group that divides head_dim"
                )

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
        except (json.JSONDecodeError, RecursionError) as error:
            raise InputError(f"plan: not JSON ({error})") from error
        if type(raw.get("version")) is not int or not 1 <= raw["version"] <= VERSION:
            raise InputError(f"plan: got version {raw.get('version')!r}, this lmmjax reads 1 to {VERSION}")
        if not isinstance(raw.get("layers"), list):
            raise InputError("plan.layers: expected a list, one entry a decoder layer")
        built: dict[str, Any] = {
            "layers": tuple(_build(LayerPlan, x, f"layers[{i}]") for i, x in enumerate(raw["layers"]))
        }
        for name, kind in (("calibration", Calibration), ("cache", CacheFormat)):
            built |= {name: _build(kind, raw[name], name)} if name in raw else {}
        # Earlier versions had fewer fields; what they leave out has the defaults, which mean what they meant.
        return _build(cls, {**raw, **built, "version": VERSION}, "plan")

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


_CHECKED: dict[Any, tuple[type, ...]] = {
    int: (int,),
    bool: (bool,),
    str: (str,),
    int | None: (int, type(None)),
    str | None: (str, type(None)),
}


def _build(kind: type, raw: Any, where: str) -> Any:
    """Returns the dataclass of these values, after a look at their names and types."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if unknown := set(_mapping(raw, where)) - set(fields):
        raise InputError(f"{where}: unknown {', '.join(sorted(unknown))}; expected {', '.join(fields)}")
    for name, value in raw.items():
        expected = fields[name].type
        # type(), for a bool is an int to isinstance
        if expected in _CHECKED and type(value) not in _CHECKED[expected]:
            raise InputError(f"{where}.{name}: got {value!r}, expected {getattr(expected, '__name__', expected)}")
    for name, count in _mapping(raw.get("drop", {}), f"{where}.drop").items():
        if type(count) is not int:
            raise InputError(f"{where}.drop.{name}: got {count!r}, expected int")
    return kind(**raw)


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise InputError(f"{where}: got {value!r}, expected an object")
    return value
