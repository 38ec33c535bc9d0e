"""Orders of inputs that a pattern N:M holds in, beside a pruned checkpoint's weights: each linear may have its own."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Array, Int
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from lmmjax.errors import InputError

FILE = "orders.safetensors"
Order = Int[np.ndarray, "in"]


def name_of(index: int, linear: str) -> str:
    """Returns what the order of a layer's linear is called."""
    return f"layers_{index}.{linear}"


def as_file(orders: Mapping[str, Array | Order]) -> dict[str, bytes]:
    """Returns what is to lie beside the weights, by file name: nothing where no linear has an order."""
    return {FILE: save({name: np.asarray(order, np.int32) for name, order in orders.items()})} if orders else {}


def read(checkpoint: Path) -> dict[str, Order]:
    """Returns the orders beside a checkpoint's weights, by name, but for those in which nothing has moved.

    Raises:
        InputError: the file is damaged, or something in it is no order.
    """
    path = checkpoint / FILE
    try:
        found = load_file(path) if path.exists() else {}
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read ({error}); prune the model again") from error
    for name, order in found.items():
        if order.ndim != 1 or order.dtype.kind not in "iu" or not np.array_equal(np.sort(order), np.arange(order.size)):
            raise InputError(f"{path}: {name} is no order of inputs, each of them once; prune the model again")
    return {name: order for name, order in found.items() if not np.array_equal(order, np.arange(order.size))}
