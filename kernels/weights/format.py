"""What a weight matrix is to be kept as, and what that takes: pattern, bits of a value, inputs that share a scale."""

import dataclasses
import re

from kernels.weights import masks

BITS = (32, 16, 8, 4)
START = 4
"""Bytes of a row's place in a bitmap's values."""
SCALE = 2


@dataclasses.dataclass(frozen=True)
class WeightFormat:
    """A way to keep a matrix.

    Args:
        kind: "dense" (all weights), "bitmap" (those that are not zero) or such as "2:4" (2 of every 4 inputs).
        bits: of a value: 8 or 4 for codes; otherwise those of its float dtype.
        group: how many consecutive inputs share a scale; None is a whole row.
    """

    kind: str
    bits: int = 16
    group: int | None = None

    def __post_init__(self):
        if self.kind not in ("dense", "bitmap") and self.pattern is None:
            raise ValueError(f"kind: got {self.kind!r}, expected dense, bitmap or N:M such as 2:4")
        if self.bits not in BITS:
            raise ValueError(f"bits: got {self.bits}, expected one of {', '.join(map(str, BITS))}")
        if self.group is not None and self.group < 1:
            raise ValueError(f"group: got {self.group}, expected at least 1")

    @property
    def pattern(self) -> tuple[int, int] | None:
        """N and M; None where there is no pattern."""
        found = re.fullmatch(r"(\d+):(\d+)", self.kind)
        if found is None or not 0 < int(found[1]) < int(found[2]):
            return None
        return int(found[1]), int(found[2])

    def nbytes(self, inputs: int, outputs: int, row_kept: list[int] | int) -> int:
        """Returns the bytes of a matrix whose rows keep so many weights each (N:M and dense: whatever that says)."""
        return outputs * self._row_bytes(inputs) + self._value_bytes(inputs, outputs, row_kept)

    def _row_bytes(self, inputs: int) -> int:
        """Returns the bytes of a row's scales and mask."""
        groups = -(-inputs // (self.group or inputs)) if self.bits <= 8 else 0
        return SCALE * groups + (0 if self.kind == "dense" else masks.width(inputs))

    def _value_bytes(self, inputs: int, outputs: int, row_kept: list[int] | int) -> int:
        if self.kind == "bitmap":
            counts = [row_kept] * outputs if isinstance(row_kept, int) else row_kept
            return sum(self._bytes_of(count) for count in counts) + START * (outputs + 1)
        n, m = self.pattern or (1, 1)
        return outputs * self._bytes_of(inputs // m * n)

    def _bytes_of(self, count: int) -> int:
        return -(-count * self.bits // 8)
