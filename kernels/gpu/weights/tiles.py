"""How a product is shared among programs, and what each takes at once. Chosen by how it compiles; tuned on no GPU."""

from typing import NamedTuple

from kernels.gpu.device import Device
from kernels.gpu.weights.arrange import ROWS
from kernels.gpu.weights.layout import TILE, Arranged, Pairs

WAVES = 4
"""Programs that a multiprocessor should be given."""
STEPS = 2
"""The fewest steps that are worth a program: with one, nothing is loaded while something is computed."""

SHORT = 16
"""Columns of a block of which more warps would get less than 4 bytes a thread, and no asynchronous copy, of x."""


class Tiles(NamedTuple):
    """Rows of the matrix and warps of a program, blocks of a step, loads in flight, programs that share a row."""

    rows: int
    warps: int
    step: int
    stages: int
    splits: int = 1


def tiles_of(matrix: Arranged, gpu: Device) -> Tiles:
    """Returns how to share a product so that the device is filled."""
    tiles = _tiles(matrix)
    steps, rows = matrix.blocks // tiles.step, matrix.values.shape[0]
    twice = tiles._replace(rows=2 * tiles.rows, warps=2 * tiles.warps)
    enough = rows % twice.rows == 0 and rows // twice.rows * steps >= STEPS * WAVES * gpu.cores
    # A program of twice the rows reads x half as often: worth it where there are enough of them.
    if enough and not isinstance(matrix, Pairs) and matrix.columns > SHORT:
        tiles = twice
    wanted = min(-(-WAVES * gpu.cores * tiles.rows // rows), max(steps // STEPS, 1))
    return tiles._replace(splits=-(-steps // -(-steps // wanted)))


def _tiles(matrix: Arranged) -> Tiles:
    stages = 3 if matrix.bits == 4 else 2
    if isinstance(matrix, Pairs):
        return Tiles(ROWS, 4 if matrix.columns > SHORT else 2, TILE, stages)
    return Tiles(ROWS, 2, 2, stages)
