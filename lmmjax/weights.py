"""A checkpoint's weights on disk: numbered parts, each an Orbax tree of about a layer, read whole or in part.

Parts, because Orbax's own partial saving merges them at the end in quadratic time: 300 of them took it more
than ten minutes, and 13B parameters make as many. A matrix without its zeros lies as its arrays, NAME.mask,
NAME.values ...; matrices.json beside the parts says what they are.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike
from orbax.checkpoint.experimental import v1 as ocp

from kernels.weights import Matrix, Table, facts
from kernels.weights.matmul import placed
from lmmjax.errors import InputError, first_line
from lmmjax.files import read_json
from lmmjax.llava import Params

MATRICES = "matrices.json"
_PART_BYTES = 64 * 2**20


class Writer:
    """Writes leaves into a new directory; holds at most one leaf more than 64 MiB of them."""

    def __init__(self, directory: Path):
        self.dtypes: set[str] = set()
        self._directory = directory.resolve()  # Orbax wants it absolute
        self._held: dict[str, np.ndarray] = {}
        self._parts = 0
        self._matrices: dict[str, Any] = {}

    def add(self, name: str, leaf: np.ndarray | Matrix) -> None:
        """Takes the leaf with this dotted name, such as "text.layers_0.attn.q.kernel"."""
        if isinstance(leaf, Matrix):
            self._matrices[name] = facts.described(leaf)
            self._held |= {f"{name}.{field}": np.asarray(array) for field, array in facts.arrays(leaf).items()}
            self.dtypes.add(f"{leaf.kind} {leaf.bits} bits")
        else:
            self._held[name] = leaf
            self.dtypes.add(str(leaf.dtype))
        if sum(held.nbytes for held in self._held.values()) >= _PART_BYTES:
            self._write()

    def finish(self) -> None:
        """Writes what is held, and what matrices there are."""
        self._write()
        if self._matrices:
            (self._directory / MATRICES).write_text(json.dumps(self._matrices, indent=1))

    def _write(self) -> None:
        if self._held:
            ocp.save(str(self._directory / f"{self._parts:05}"), unflatten_dict(self._held, sep="."))
            self._held.clear()
            self._parts += 1


def leaves(directory: Path) -> dict[str, Any]:
    """Returns {dotted name: shape and dtype} of the stored leaves, or a matrix of these, without reading them."""
    return Reader(directory).leaves


def is_packed(directory: Path) -> bool:
    """Returns whether some leaves are matrices without their zeros."""
    return (directory / MATRICES).exists()


def matrices(params: Params) -> list[Matrix]:
    """Returns all leaves that are matrices without their zeros."""
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, Matrix))
    return [leaf for leaf in leaves if isinstance(leaf, Matrix)]


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
        self._matrices = _matrices(directory)

    @property
    def leaves(self) -> dict[str, Any]:
        """{dotted name: shape and dtype, or a matrix of these} of all stored leaves."""
        return _gathered(
            {
                name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
                for _, part in self._parts
                for name, leaf in part.items()
            },
            self._matrices,
        )

    def read(self, names: Iterable[str]) -> dict[str, Any]:
        """Returns the leaves with these names, as stored."""
        wanted = set(names)
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        found: dict[str, np.ndarray] = {}
        with context:
            for path, part in self._parts:
                if here := {name: leaf for name, leaf in part.items() if self._leaf(name) in wanted}:
                    found |= _load(path, here)
        return _gathered(found, self._matrices)

    def _leaf(self, name: str) -> str:
        """Returns the leaf that a stored array is, or is a part of."""
        owner = name.rpartition(".")[0]
        return owner if owner in self._matrices else name


def read_tree(directory: Path, dtype: DTypeLike | None, device: jax.Device) -> Params:
    """Returns all leaves on a device, cast to `dtype` if one is given.

    Matrices without their zeros are not cast; they are laid out as the device multiplies by them, a part at a time.
    """
    sharding = jax.sharding.SingleDeviceSharding(device)
    matrices = _matrices(directory)
    found: dict[str, Any] = {}
    for path, part in _parts(directory):
        like = {
            name: jax.ShapeDtypeStruct(
                leaf.shape,
                leaf.dtype if name.rpartition(".")[0] in matrices else dtype or leaf.dtype,
                sharding=sharding,
            )
            for name, leaf in part.items()
        }
        for name, leaf in _gathered(_load(path, like), matrices).items():
            found[name] = _placed(leaf, dtype) if isinstance(leaf, Matrix) else leaf
    return unflatten_dict(found, sep=".")


def _placed(matrix: Matrix, dtype: DTypeLike | None) -> Matrix | jax.Array:
    """Returns a matrix on its device; what tables give is cast, as plain embeddings are."""
    return placed(matrix.replace(dtype=str(dtype)) if isinstance(matrix, Table) and dtype is not None else matrix)


def _matrices(directory: Path) -> dict[str, Any]:
    """Returns the facts of the matrices without their zeros, by name."""
    return read_json(directory / MATRICES) if is_packed(directory) else {}


def _gathered(found: dict[str, Any], matrices: Mapping[str, Any]) -> dict[str, Any]:
    """Returns leaves by name, with each matrix in the place of its arrays, which never lie in two parts."""
    whole = {name: leaf for name, leaf in found.items() if name.rpartition(".")[0] not in matrices}
    arrays: dict[str, dict[str, Any]] = {}
    for name, leaf in found.items():
        owner, _, field = name.rpartition(".")
        if owner in matrices:
            arrays.setdefault(owner, {})[field] = leaf
    for name, fields in arrays.items():
        try:
            whole[name] = facts.assembled(dict(matrices[name]), fields)
        except (TypeError, ValueError) as error:
            raise InputError(f"{MATRICES}: {name} is no packed matrix ({error}); pack it again") from error
    return whole


def _parts(directory: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yields each part's path and what Orbax says about its leaves."""
    for path in sorted(entry for entry in directory.resolve().iterdir() if entry.is_dir()):
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
