"""Which quantized caches are measured against each other: KIVI's, each option added to it, ours, ours less one."""

import dataclasses
from typing import NamedTuple

from benchmarks.kv_peers import kivi, per_token
from lmmjax.config import TextConfig
from lmmjax.plan import CacheFormat

OURS = CacheFormat(sinks=1, metadata="float8", keys="before_rope", rotate_values="online", clip=True)
"""The best of all affine formats that were tried: half a bit of metadata a value, as groups of 64 have in float16."""
WIDTHS = (4, 3, 2)


class Row(NamedTuple):
    """One cache: a format, and its widths; those of image tokens where they differ, None: as text.

    With a `budget` the widths are chosen a layer by sensitivity, in as many bytes as `budget` bits a value take.
    """

    method: str
    form: CacheFormat
    bits: int
    visual_bits: int | None = None
    budget: float | None = None


def rows(text: TextConfig) -> list[Row]:
    """Returns all rows, the most telling first."""
    schemes = {
        "KIVI": kivi(),
        "ours": OURS,
        "per token": per_token(text),
        "KIVI, groups of 64": kivi(64),
        "ours, after RoPE": dataclasses.replace(OURS, keys="after_rope"),
    }
    found = [Row(name, form, bits) for name, form in schemes.items() for bits in WIDTHS]
    found += [Row("ours, by layer", OURS, 0, budget=budget) for budget in (4.5, 3.5, 3.0, 2.75)]
    found += [Row(f"KIVI + {name}", form, bits) for name, form in _with_one_option().items() for bits in WIDTHS]
    found += [Row(f"ours, {name}", form, bits) for name, form in _without_one().items() for bits in WIDTHS]
    return found + [Row("ours, image tokens 2", OURS, bits, visual_bits=2) for bits in (4, 3)]


def _with_one_option() -> dict[str, CacheFormat]:
    plain = kivi()
    return {
        "sink": dataclasses.replace(plain, sinks=1),
        "before RoPE": dataclasses.replace(plain, keys="before_rope"),
        "rotated keys": dataclasses.replace(plain, rotate_keys=True),
        "rotated values": dataclasses.replace(plain, rotate_values="online"),
        "clip": dataclasses.replace(plain, clip=True),
        "float8": dataclasses.replace(plain, metadata="float8"),
        "codebook": dataclasses.replace(plain, codebook="normal"),
        "image values by channel": dataclasses.replace(plain, visual_values="tokens"),
    }


def _without_one() -> dict[str, CacheFormat]:
    return {
        "no sink": dataclasses.replace(OURS, sinks=0),
        "values not rotated": dataclasses.replace(OURS, rotate_values="no"),
        "no clip": dataclasses.replace(OURS, clip=False),
        "groups of 64 in float16": dataclasses.replace(OURS, group=64, metadata="float16"),
        "keys rotated after RoPE": dataclasses.replace(OURS, keys="after_rope", rotate_keys=True),
    }
