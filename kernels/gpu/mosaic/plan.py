"""What is static of a call: how each side is kept, how many tokens a step takes, and how wide its products are."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int16

from kernels import words
from kernels.gpu.settled import Codes

TILE = 64
"""Rows of a wgmma, and the run of neighbouring tokens in a block of value words."""
COLUMNS = 8
"""The fewest columns of a wgmma, and the most query rows."""
LANES = 4
"""Lanes of a warp that share a row of a wgmma's result, two columns each."""
STAGES = 2
"""Steps whose words lie in shared memory at the same time, where there is room."""


class Plane(NamedTuple):
    """A plane of words: of each code the `width` bits from bit `left` on."""

    width: int
    left: int

    @property
    def fields(self) -> int:
        return words.fields(self.width)

    def place(self, field: int) -> int:
        """Returns at which bit of its byte a field begins."""
        return field * self.width % 8

    def weight(self, field: int) -> float:
        """Returns what 1 at a field's place is worth in steps of the code."""
        return 2.0 ** (self.left - self.place(field))

    def read(self, word: Int16[Array, "n w"], field: int) -> Float[Array, "n w"]:
        """Returns field * 2^(place - 24) of words, of which the field's byte is the low one; see `gpu.fields`."""
        mask = ((1 << self.width) - 1) << self.place(field)
        whole = self.width == 8 and field == 1
        return lax.bitcast_convert_type(word if whole else word & jnp.int16(mask), jnp.float16)


class Side(NamedTuple):
    """How one side's tokens are kept."""

    planes: tuple[Plane, ...]
    levels: int
    group: int

    @classmethod
    def of(cls, codes: Codes) -> "Side":
        widths = words.PLANES[codes.bits]
        planes = (Plane(width, sum(widths[i + 1 :])) for i, width in enumerate(widths))
        return cls(tuple(planes), 2**codes.bits - 1, codes.group)


class Plan(NamedTuple):
    """What is static of a call. A lone query leaves the 8 columns of its products to as many groups.

    Args:
        alone: whether there is one query row.
        heads, groups: kv heads, and groups of keys that there is metadata for.
        metadata: the type of spans and zeros.
        interpret: whether inline assembly gives way to its meaning.
    """

    keys: Side
    values: Side
    alone: bool
    dim: int
    heads: int
    groups: int
    splits: int
    stages: int
    metadata: Any
    interpret: bool

    @classmethod
    def of(cls, q: Float[Array, "b k m d"], keys: Codes, values: Codes, splits: int, interpret: bool) -> "Plan":
        heads, m, dim = q.shape[1:]
        assert keys.span is not None
        kind = jnp.float16 if keys.span.dtype == jnp.float16 else jnp.float8_e4m3fn
        sides = Side.of(keys), Side.of(values)
        plan = cls(*sides, m == 1, dim, heads, keys.span.shape[2], splits, STAGES, kind, interpret)
        return plan._replace(groups=max(plan.groups, plan.ahead))

    @property
    def step(self) -> int:
        """How many tokens are read at a time."""
        return max(self.keys.group, *(TILE * plane.fields for plane in self.values.planes))

    @property
    def ahead(self) -> int:
        """For how many groups of keys the queries are scaled at a time."""
        groups = self.step // self.keys.group
        return max(groups, COLUMNS) if self.alone else groups

    @property
    def period(self) -> int:
        """How many steps the scaled queries serve."""
        return self.ahead * self.keys.group // self.step

    @property
    def key_columns(self) -> int:
        return self.ahead * (1 if self.alone else COLUMNS)

    @property
    def chunk(self) -> int:
        """How many tokens a product with keys has: few enough that its operands fit in registers."""
        return 2 * TILE if self.alone or self.keys.group > TILE else TILE

    @property
    def depth(self) -> int:
        """How many terms of its sums a product takes at once: more need more registers, fewer more instructions."""
        return 32 if self.alone else 16

    @property
    def value_groups(self) -> int:
        return self.dim // self.values.group

    @property
    def value_columns(self) -> int:
        return COLUMNS * (1 if self.alone else self.value_groups)

    @property
    def value_copies(self) -> int:
        """How often the metadata of values is copied: a row for each of the lanes that share a token."""
        return LANES // self.value_groups if self.alone and self.value_groups > 1 else 1
