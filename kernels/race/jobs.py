"""What is measured, and in which order: the most telling first, so that a run that is cut off has it."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from kernels import attend
from kernels.race.caches import Scheme, Shape
from kernels.race.entrants import DEQUANTIZE

SCHEMES = {scheme.name: scheme for scheme in (Scheme(128, "float8"), Scheme(32, "float16"))}
"""Our own scheme of groups, and KIVI's."""
WIDTHS = (4, 8, 2, 16, 3)
"""The most telling first."""
PEERS = "peers"


class Size(NamedTuple):
    """How much is measured.

    `rows` are (batch, tokens), `heads` (heads, kv heads). `working_set` bytes are gone round, `copied` ones copied. A
    turn takes at least `seconds`. The floors hold from `large` cached tokens on, over all rows.
    """

    rows: tuple[tuple[int, int], ...]
    heads: tuple[tuple[int, int], ...]
    head_dim: int
    working_set: int
    copied: int
    rounds: int
    seconds: float
    large: int


FULL = Size(
    rows=((32, 4096), (8, 16384), (32, 16384), (32, 1024), (8, 4096), (1, 16384), (8, 1024), (1, 4096), (1, 1024)),
    heads=((32, 32), (32, 8)),
    head_dim=128,
    working_set=2**29,  # ten times the second-level cache of an H100
    copied=2**31,
    rounds=21,
    seconds=0.01,
    large=2**17,
)
SMOKE = Size(
    rows=((2, 256), (1, 256)),
    heads=((2, 2), (4, 2)),
    head_dim=32,
    working_set=2**15,
    copied=2**20,
    rounds=3,
    seconds=0.0,
    large=2**9,
)


class Job(NamedTuple):
    """All peers on a shape, or one way of ours on caches of one format beside the best of them."""

    shape: Shape
    way: str = PEERS
    scheme: Scheme | None = None
    bits: int = 16

    @property
    def name(self) -> str:
        if self.way == PEERS:
            return f"{self.shape.name} {PEERS}"
        return f"{self.shape.name} {self.scheme.name if self.scheme else 'exact'} {self.bits} {self.way}"


def schedule(
    shapes: Sequence[Shape], large: int, widths: Sequence[int], schemes: Sequence[Scheme], ways: Sequence[str] | None
) -> list[Job]:
    """Returns all jobs: shapes with `large` tokens or more first, with the first scheme, then with the others.

    Of `ways`, None is all; then those that read the whole cache in floating point come behind the others. A shape's
    peers come before its first job.
    """
    able = list(ways or [*attend.BACKENDS, DEQUANTIZE])
    slow = () if ways else ("reference", DEQUANTIZE)

    def worth(job: Job) -> tuple:
        rank = schemes.index(job.scheme) if job.scheme else 0
        return job.shape.cached < large, job.way in slow, rank, shapes.index(job.shape)

    formats = [(bits, scheme) for bits in WIDTHS if bits in widths for scheme in (schemes if bits < 16 else [None])]
    jobs = [Job(shape, way, scheme, bits) for shape, (bits, scheme), way in itertools.product(shapes, formats, able)]
    # Sorting is stable: within what is worth the same, by width and then by way.
    return list(_with_peers(sorted((job for job in jobs if job.bits < 16 or job.way != DEQUANTIZE), key=worth)))


def _with_peers(jobs: Iterable[Job]) -> Iterator[Job]:
    seen = set()
    for job in jobs:
        if job.shape not in seen:
            seen.add(job.shape)
            yield Job(job.shape)
        yield job
