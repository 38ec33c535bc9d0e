"""How much a kernel takes at once, by device: one table, with what each entry rests on."""

from typing import NamedTuple


class Tiles(NamedTuple):
    """Tokens of a tile, warps of a program, loads in flight, and programs that a multiprocessor should be given."""

    tokens: int = 64
    warps: int = 4
    stages: int = 2
    waves: int = 8


DEFAULT = Tiles()

TRITON: dict[str, Tiles] = {
    "": DEFAULT,  # as compiled for sm_80, sm_87, sm_89 and sm_90a without spills; on an H100 the fastest of twelve
}
"""By the beginning of the device's kind."""

MOSAIC: dict[str, Tiles] = {
    "": Tiles(waves=4),  # two programs of 83 KiB fit a multiprocessor; on an H100 2 and 8 were as fast
}
"""By the beginning of the device's kind; tiles, warps and loads in flight are the kernel's own."""


def tiles_of(table: dict[str, Tiles], kind: str) -> Tiles:
    """Returns the entry whose key is the longest beginning of the device's kind."""
    return table[max((name for name in table if kind.startswith(name)), key=len)]
