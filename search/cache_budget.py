"""The KV cache's budget: projects wished widths onto it, metadata and window counted, before anything is evaluated."""

import dataclasses
import functools
import math

import numpy as np
from jaxtyping import Float, Int

from lmmjax.cache import cache_bytes
from lmmjax.config import TextConfig
from lmmjax.errors import InputError
from lmmjax.plan import BITS, CacheFormat, LayerPlan, Plan


@dataclasses.dataclass(frozen=True)
class CacheBudget:
    """At `context` tokens the KV cache takes at most the share `keep` of its dense bytes, all metadata counted.

    `images` of the tokens are one picture's: where the format keeps these apart, they have room of their own.
    """

    text: TextConfig
    keep: float
    context: int
    form: CacheFormat
    images: int = 0

    def __post_init__(self):
        if not 0 < self.keep <= 1:
            raise InputError(f"--kv-budget: got {self.keep:g}, expected a share of the dense bytes, 0 < share <= 1")
        if self.context < 1:
            raise InputError(f"--context: got {self.context}, expected a number of tokens, at least 1")
        if self.form.visual_values != "channels" and self.context <= self.images:
            raise InputError(f"--context: got {self.context}, expected more than a picture's {self.images} tokens")
        narrowest = {side: np.zeros(self.text.layers, int) for side in ("keys", "values")}
        lowest = self.share(*self._bits(narrowest))
        if self.keep < lowest:
            flags = (f"--{name} {getattr(self.form, name)}" for name in ("group", "window", "sinks"))
            raise InputError(
                f"--kv-budget: got {self.keep:g} of the dense bytes; with --context {self.context}, {', '.join(flags)}"
                f" the cache can take {math.ceil(lowest * 1e4) / 1e4:.4f} to 1: raise the budget"
            )

    @functools.cached_property
    def side_bytes(self) -> dict[str, dict[int, int]]:
        """Returns the bytes of one layer's keys, and of its values, at every width."""

        def layer_bytes(key_bits: int, value_bits: int) -> int:
            plan = Plan((LayerPlan(key_bits, value_bits),), cache=self.form)
            return cache_bytes(dataclasses.replace(self.text, layers=1), plan, 1, self.context, self.images)

        dense = layer_bytes(16, 16) // 2
        return {
            "keys": {bits: layer_bytes(bits, 16) - dense for bits in BITS},
            "values": {bits: layer_bytes(16, bits) - dense for bits in BITS},
        }

    @functools.cached_property
    def widths(self) -> dict[str, tuple[int, ...]]:
        """Returns the widths worth having, ascending: those that take fewer bytes than every wider one."""
        return {
            side: tuple(b for b in reversed(BITS) if all(table[b] < table[wider] for wider in BITS if wider > b))
            for side, table in self.side_bytes.items()
        }

    @property
    def dense_bytes(self) -> int:
        return self.text.layers * (self.side_bytes["keys"][16] + self.side_bytes["values"][16])

    def nbytes(self, key_bits: Int[np.ndarray, "l"], value_bits: Int[np.ndarray, "l"]) -> int:
        keys, values = self.side_bytes["keys"], self.side_bytes["values"]
        return sum(keys[int(bits)] for bits in key_bits) + sum(values[int(bits)] for bits in value_bits)

    def share(self, key_bits: Int[np.ndarray, "l"], value_bits: Int[np.ndarray, "l"]) -> float:
        return self.nbytes(key_bits, value_bits) / self.dense_bytes

    def project(
        self, key_wish: Float[np.ndarray, "l"], value_wish: Float[np.ndarray, "l"]
    ) -> tuple[Int[np.ndarray, "l"], Int[np.ndarray, "l"]]:
        """Returns bits of every layer's keys and values that fill the budget: no side could be one step wider.

        A wish w stands for the width `widths[floor(w)]`. All sides start at their narrowest; the steps up happen
        in the order in which a common shift of the wishes would cause them, each if it still fits. Ties: keys
        before values (their error costs more), then the layers in order.
        """
        wishes = {"keys": key_wish, "values": value_wish}
        steps = sorted(
            (level - wish, side, layer, level)
            for side in ("keys", "values")
            for layer, wish in enumerate(wishes[side])
            for level in range(1, len(self.widths[side]))
        )
        levels = {side: np.zeros(self.text.layers, int) for side in wishes}
        left = self.keep * self.dense_bytes - self.nbytes(*self._bits(levels)) + 1e-6
        for _, side, layer, level in steps:
            narrow, wide = (self.side_bytes[side][self.widths[side][i]] for i in (level - 1, level))
            if levels[side][layer] == level - 1 and wide - narrow <= left:
                levels[side][layer] = level
                left -= wide - narrow
        return self._bits(levels)

    def encode(self, side: str, bits: Int[np.ndarray, "l"]) -> Float[np.ndarray, "l"]:
        """Returns the wishes that stand for these widths of the keys or values."""
        return np.searchsorted(self.widths[side], bits).astype(float)

    def uniform(self) -> list[tuple[int, int]]:
        """Returns the (key, value) widths that fit when all layers are alike, the largest caches first.

        Of two equally large ones the one with the wider keys comes first. Pairs dominated by another are left out.
        """
        pairs = [(k, v) for k in self.widths["keys"] for v in self.widths["values"] if self._fits(k, v)]
        best = [(k, v) for k, v in pairs if not any(a >= k and b >= v and (a, b) != (k, v) for a, b in pairs)]
        return sorted(best, key=lambda pair: (-self._layer_bytes(*pair), -pair[0]))

    def _fits(self, key_bits: int, value_bits: int) -> bool:
        return self.text.layers * self._layer_bytes(key_bits, value_bits) <= self.keep * self.dense_bytes + 1e-6

    def _layer_bytes(self, key_bits: int, value_bits: int) -> int:
        return self.side_bytes["keys"][key_bits] + self.side_bytes["values"][value_bits]

    def _bits(self, levels: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        keys, values = (np.array(self.widths[side])[levels[side]] for side in ("keys", "values"))
        return keys.astype(np.int32), values.astype(np.int32)
