"""A checkpoint's weights on disk: Orbax, written layer by layer, read whole or in part."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike
from orbax.checkpoint.experimental import v1 as ocp

from lmmjax.errors import InputError
from lmmjax.llava import Params

_FLUSH_BYTES = 128 * 2**20


class Writer:
    """Adds leaves to a directory of weights; holds at most one leaf more than 128 MiB of them."""

    def __init__(self, directory: Path):
        self.dtypes: set[str] = set()
        self._directory = str(directory.resolve())  # Orbax wants it absolute
        self._held: dict[str, np.ndarray] = {}

    def add(self, name: str, array: np.ndarray) -> None:
        """Takes the leaf with this dotted name, such as "text.layers_0.attn.q.kernel"."""
        self._held[name] = array
        self.dtypes.add(str(array.dtype))
        if sum(held.nbytes for held in self._held.values()) >= _FLUSH_BYTES:
            self._flush()

    def finish(self) -> None:
        """Writes what is held and closes the directory; it cannot be read before."""
        self._flush()
        ocp.partial.finalize(self._directory)

    def _flush(self) -> None:
        if self._held:
            ocp.partial.save(self._directory, unflatten_dict(self._held, sep="."))
            self._held.clear()


def leaves(directory: Path) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns {dotted name: shape and dtype} of the stored leaves, without reading them."""
    return {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in _described(directory).items()}


def read(directory: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Returns some leaves as stored, in host memory, and reads no others."""
    described = _described(directory)
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with context:
        return _flat(_load(directory, {name: described[name] for name in names}))


def read_tree(directory: Path, dtype: DTypeLike | None, device: jax.Device) -> Params:
    """Returns all leaves on a device, cast to `dtype` if one is given."""
    sharding = jax.sharding.SingleDeviceSharding(device)
    like = {
        name: jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=sharding)
        for name, leaf in leaves(directory).items()
    }
    return _load(directory, like)


def _described(directory: Path) -> dict[str, Any]:
    with _readable(directory):
        return _flat(ocp.metadata(str(directory.resolve())).metadata)


def _load(directory: Path, like: Mapping[str, Any]) -> Params:
    with _readable(directory):
        return ocp.load(str(directory.resolve()), unflatten_dict(like, sep="."))


def _flat(tree: Any) -> dict[str, Any]:
    return dict(flatten_dict(tree, sep="."))


@contextlib.contextmanager
def _readable(directory: Path) -> Iterator[None]:
    """Turns Orbax's complaint about a damaged or incomplete directory into one line."""
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise InputError(f"{directory}: the weights cannot be read ({reason}); convert them again") from error
