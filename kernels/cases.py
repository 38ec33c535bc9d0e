"""Named calls of the attention op: what tests prove of every backend, and what compiles."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from kernels.metadata import Metadata
from kernels.quantize import Quantizer
from kernels.stores import Dense, Packed, Split, Store
from kernels.stores.base import Side


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer's cache and the queries that meet it.

    Args:
        bits, visual: widths of keys and of values; `visual` those of image tokens, if they are kept apart.
        heads: query heads, kv heads and head_dim.
        lengths: tokens that each row holds, the queries' own among them; `capacity` what it has room for.
        t: queries a row.
        images: from which position to which tokens are image tokens, if these are kept apart.
    """

    bits: tuple[int, int]
    heads: tuple[int, int, int] = (2, 2, 128)
    lengths: tuple[int, ...] = (300, 7)
    capacity: int = 512
    t: int = 1
    group: int = 128
    value_group: int = 128
    metadata: Metadata = "float8"
    window: int = 0
    sinks: int = 0
    visual: tuple[int, int] | None = None
    images: tuple[int, int] = (0, 0)

    def stores(self) -> tuple[Store, Store]:
        """Returns the empty stores of keys and of values."""
        return self._store("keys", 0), self._store("values", 1)

    def is_image(self) -> Bool[Array, "b s"] | None:
        """Returns which positions hold image tokens, if these are kept apart."""
        if self.visual is None:
            return None
        inside = (jnp.arange(self.capacity) >= self.images[0]) & (jnp.arange(self.capacity) < self.images[1])
        return jnp.broadcast_to(inside, (len(self.lengths), self.capacity))

    def _store(self, side: Side, at: int) -> Store:
        if self.visual is None and (not self.sinks or self.bits[at] == 16):
            return self._part(side, self.bits[at])
        return Split(
            text=self._part(side, self.bits[at]),
            sinks=Dense.empty(self._shape(self.sinks), jnp.bfloat16) if self.sinks else None,
            visual=self._part(side, self.visual[at]) if self.visual else None,
            capacity=self.capacity,
        )

    def _part(self, side: Side, bits: int) -> Dense | Packed:
        if bits == 16:
            return Dense.empty(self._shape(self.capacity), jnp.bfloat16)
        keys = side == "keys"
        quantizer = Quantizer(
            "tokens" if keys else "channels", self.group if keys else self.value_group, metadata=self.metadata
        )
        return Packed.empty(self._shape(self.capacity), bits, side, quantizer, self.window, jnp.bfloat16)

    def _shape(self, tokens: int) -> tuple[int, int, int, int]:
        return len(self.lengths), self.heads[1], tokens, self.heads[2]


_SMOL = (6, 2, 64)
CASES: dict[str, Case] = {
    "exact": Case((16, 16), lengths=(300, 1)),
    "8 bits": Case((8, 8), lengths=(512, 40), group=64, value_group=64),
    "4 bits": Case((4, 4)),
    "2 bits": Case((2, 2)),
    "4 bits, KIVI's format": Case((4, 4), group=32, value_group=32, metadata="float16", window=32),
    "smol, 3 bits and a sink": Case((3, 3), _SMOL, capacity=1024, lengths=(700, 9), group=32, value_group=32, sinks=1),
    "smol, keys of 6 and values of 2 bits": Case((6, 2), _SMOL, group=32, value_group=32, metadata="float16"),
    "four query heads on one": Case((4, 2), (8, 2, 128)),
    "eight query heads on one, exact": Case((16, 16), (8, 1, 64), lengths=(130, 64)),
    "exact keys beside a sink": Case((16, 4), sinks=1),
    "exact values beside sinks": Case((4, 16), sinks=2),
    "a draft of 4 tokens": Case((4, 4), _SMOL, t=4, group=32, value_group=64, sinks=1, lengths=(300, 6)),
    "a turn of 8 tokens": Case((8, 4), (2, 2, 64), t=8, group=32, value_group=64, window=32, lengths=(300, 8)),
    "5 tokens over an exact cache": Case((16, 16), (4, 2, 64), t=5, lengths=(300, 5)),
    "image tokens of fewer bits": Case(
        (4, 4), (2, 2, 64), group=32, value_group=64, visual=(2, 2), images=(3, 200), sinks=1
    ),
    "a draft behind image tokens": Case(
        (8, 4), (2, 2, 64), t=2, group=32, value_group=64, visual=(4, 16), images=(0, 100), lengths=(150, 120)
    ),
    "twelve query rows of a kv head": Case((4, 4), (6, 2, 64), t=4, group=64, value_group=64, lengths=(150, 9)),
    "short runs of words": Case((4, 3), _SMOL, capacity=96, lengths=(90, 33), group=32, value_group=64),
    "a head_dim of 80": Case((4, 4), (2, 2, 80), group=16, value_group=80, lengths=(100, 300)),
}

_KIVI = Case((4, 4), (4, 2, 64), group=32, value_group=32, metadata="float16", window=32)
PROMPTS: dict[str, Case] = {
    "exact": Case((16, 16), (4, 2, 64), (40, 40), 48, t=40),
    "exact, behind other tokens": Case((16, 16), (4, 1, 64), (60, 45), 64, t=40),
    "exact, of unlike lengths": Case((16, 16), (2, 2, 64), (40, 9), 48, t=40),
    "4 bits, no window": Case((4, 4), (4, 2, 64), (40, 33), 64, t=40, group=16, value_group=32),
    "4 bits, KIVI's format": dataclasses.replace(_KIVI, lengths=(80, 80), capacity=96, t=80),
    "KIVI's format, behind other tokens": dataclasses.replace(_KIVI, lengths=(90, 61), capacity=96, t=24),
    "a first prompt beside a later one": dataclasses.replace(_KIVI, lengths=(90, 30), capacity=96, t=40),
    "exact values beside sinks": Case((4, 16), (2, 2, 64), (50, 40), 64, t=40, group=16, value_group=64, sinks=2),
    "exact keys beside a sink": Case((16, 3), (2, 2, 64), (50, 40), 64, t=40, group=16, value_group=64, sinks=1),
    "image tokens of fewer bits": Case(
        (4, 4), (2, 2, 64), (60, 33), 64, t=40, group=16, value_group=64, visual=(2, 2), images=(3, 30), sinks=1
    ),
    "image tokens' values exact": Case(
        (8, 4), (2, 1, 64), (40, 40), 64, t=40, group=16, value_group=64, visual=(4, 16), images=(4, 25), window=16
    ),
}
"""Of more new tokens than kernels take. A row shorter than `t` was empty before, and its prompt is padded behind."""


def relative_error(found: Float[np.ndarray, "*any"], expected: Float[np.ndarray, "*any"]) -> float:
    """Returns the Frobenius norm of the difference over that of what is expected, in float64."""
    difference = found.astype(np.float64) - expected
    return float(np.linalg.norm(difference) / np.linalg.norm(expected))
