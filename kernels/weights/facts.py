"""A matrix as static facts and arrays by name, which is how files hold it, and back."""

import re
from typing import Any

from jaxtyping import Array

from kernels.weights import masks
from kernels.weights.formats import NM, Bitmap, Full, Matrix, Table

KINDS: dict[str, type[Matrix]] = {"dense": Full, "table": Table, "bitmap": Bitmap, "n:m": NM}


def described(matrix: Matrix) -> dict[str, Any]:
    """Returns a matrix's static facts, ready for JSON: with its arrays by name they are the matrix.

    Raises:
        ValueError: a matrix that was laid out for a device.
    """
    if type(matrix) not in KINDS.values():
        raise ValueError(f"matrix: got {type(matrix).__name__}, a device's layout; expected its `canonical()`")
    names = ("kind", "inputs", "bits", "group", "dtype")
    return {name: fact for name in names if (fact := getattr(matrix, name, None)) is not None}


def arrays(matrix: Matrix) -> dict[str, Array]:
    """Returns a matrix's arrays by name."""
    names = ("mask", "values", "scales", "starts", "order")
    return {name: array for name in names if (array := getattr(matrix, name, None)) is not None}


def assembled(facts: dict[str, Any], arrays: dict[str, Any]) -> Matrix:
    """Returns the matrix of these facts and arrays, the reverse of `described` and `arrays`.

    Raises:
        ValueError: a kind that is not known, or arrays that do not belong to it.
    """
    kind, static = str(facts.get("kind")), {name: fact for name, fact in facts.items() if name != "kind"}
    if found := re.fullmatch(r"(\d+):(\d+)", kind):
        kind, static = "n:m", {**static, "n": int(found[1]), "m": int(found[2])}
    if kind not in KINDS:
        raise ValueError(f"kind: got {kind!r}, expected dense, table, bitmap or N:M")
    try:
        matrix = KINDS[kind](**{"scales": None, **arrays}, **static)
        expected = _shapes(matrix)
    except (TypeError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"arrays: got {', '.join(arrays)} with {facts} ({error})") from error
    found = {name: tuple(array.shape) for name, array in arrays.items()}
    if found != expected:
        raise ValueError(f"arrays: got {found}, expected {expected} of {facts}")
    return matrix


def _shapes(matrix: Matrix) -> dict[str, tuple[int, ...]]:
    """Returns the shapes that a matrix's arrays must have; how long a bitmap's values are, only these say."""
    outputs, halves = matrix.outputs, 2 if matrix.bits == 4 else 1
    per_row = matrix.per_row if isinstance(matrix, NM) else matrix.inputs
    shapes: dict[str, tuple[int, ...]] = {"values": (outputs, -(-per_row // halves))}
    if matrix.bits <= 8:
        shapes["scales"] = (outputs, -(-matrix.inputs // matrix.group))
    if not isinstance(matrix, Full):
        shapes["mask"] = (outputs, masks.width(matrix.inputs))
    if isinstance(matrix, Bitmap):
        shapes |= {"values": (matrix.values.size,), "starts": (outputs + 1,)}
    if matrix.order is not None:
        shapes["order"] = (matrix.inputs,)
    return shapes
