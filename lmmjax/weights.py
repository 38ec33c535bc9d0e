"""A checkpoint's weights on disk: numbered parts, each an Orbax tree of about a layer, read whole or in part.

Parts, because Orbax's own partial saving merges them at the end in quadratic time: 300 of them took it more
than ten minutes, and 13B parameters make as many.
"""

import contextlib
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike
from orbax.checkpoint.experimental import v1 as ocp

from lmmjax.errors import InputError, first_line
from lmmjax.llava import Params

_PART_BYTES = 64 * 2**20


class Writer:
    """Writes leaves into a new directory; holds at most one leaf more than 64 MiB of them."""

    def __init__(self, directory: Path):
        self.dtypes: set[str] = set()
        self._directory = directory.resolve()  # Orbax wants it absolute
        self._held: dict[str, np.ndarray] = {}
        self._parts = 0

    def add(self, name: str, array: np.ndarray) -> None:
        """Takes the leaf with this dotted name, such as "text.layers_0.attn.q.kernel"."""
        self._held[name] = array
        self.dtypes.add(str(array.dtype))
        if sum(held.nbytes for held in self._held.values()) >= _PART_BYTES:
            self.finish()

    def finish(self) -> None:
        """Writes what is held."""
        if self._held:
            ocp.save(str(self._directory / f"{self._parts:05}"), unflatten_dict(self._held, sep="."))
            self._held.clear()
            self._parts += 1


def leaves(directory: Path) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns {dotted name: shape and dtype} of the stored leaves, without reading them."""
    return Reader(directory).leaves


def digest(params: Params) -> "hashlib._Hash":
    """Returns a SHA-256 of weights in memory, open to more: of every tensor its shape and about 1000 numbers."""
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        step = leaf.size // 1000 | 1  # odd, so as not to meet the same column in every row
        found.update(f"{leaf.shape}".encode() + np.asarray(leaf.ravel()[::step]).tobytes())
    return found


class Reader:
    """Reads stored leaves into host memory, some at a time and no others."""

    def __init__(self, directory: Path):
        self._parts = list(_parts(directory))

    @property
    def leaves(self) -> dict[str, jax.ShapeDtypeStruct]:
        """{dotted name: shape and dtype} of all stored leaves."""
        return {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for _, part in self._parts for name, leaf in part.items()
        }

    def read(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        """Returns the leaves with these names, as stored."""
        wanted = set(names)
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        found: dict[str, np.ndarray] = {}
        with context:
            for path, part in self._parts:
                if here := {name: leaf for name, leaf in part.items() if name in wanted}:
                    found |= _load(path, here)
        return found


def read_tree(directory: Path, dtype: DTypeLike | None, device: jax.Device) -> Params:
    """Returns all leaves on a device, cast to `dtype` if one is given."""
    sharding = jax.sharding.SingleDeviceSharding(device)
    found: dict[str, Any] = {}
    for path, part in _parts(directory):
        like = {
            name: jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=sharding)
            for name, leaf in part.items()
        }
        found |= _load(path, like)
    return unflatten_dict(found, sep=".")


def _parts(directory: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yields each part's path and what Orbax says about its leaves."""
    for path in sorted(directory.resolve().iterdir()):
        with _readable(path):
            described = _flat(ocp.metadata(str(path)).metadata)
        yield path, described


def _load(path: Path, like: Mapping[str, Any]) -> dict[str, Any]:
    with _readable(path):
        return _flat(ocp.load(str(path), unflatten_dict(like, sep=".")))


def _flat(tree: Any) -> dict[str, Any]:
    return dict(flatten_dict(tree, sep="."))


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turns Orbax's complaint about a damaged file into one line."""
    try:
        yield
    except Exception as error:  # Orbax checks with assertions, too, and each of its readers raises its own kinds
        raise InputError(
            f"{path}: the weights cannot be read ({first_line(error)[:200]}); convert them again"
        ) from error
