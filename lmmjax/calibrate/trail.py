"""What a walk over the decoder leaves on disk: a file a layer, and the hidden states from where it can be taken up.

A trail is a directory named by a hash of `about`, which says of what model, samples and method it is; so a command that
asks for the same finds it. about.json, layer-NNNN.safetensors, and hidden-NNNN.safetensors until all layers are there.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxtyping import Array
from safetensors import SafetensorError, safe_open
from safetensors.flax import save_file

from lmmjax import files
from lmmjax.calibrate.tokens import Rows
from lmmjax.errors import InputError
from lmmjax.versions import installed

Arrays = dict[str, Array]
FORMAT = 1
"""Counts up when a trail of before would be misread; versions of lmmjax do not share trails either."""


class Trail:
    """The files of one walk over so many layers. One process at a time adds to it: `alone`."""

    def __init__(self, root: Path, about: Mapping[str, Any], layers: int):
        self.about, self.layers = {"format": FORMAT, "version": installed("lmmjax"), **about}, layers
        name = hashlib.sha256(json.dumps(self.about, sort_keys=True).encode()).hexdigest()[:16]
        self.directory = root / name

    @property
    def done(self) -> int:
        """How many layers a walk need not do again."""
        if all(self._layer(index).exists() for index in range(self.layers)):
            return self.layers
        return max((int(path.stem[-4:]) for path in self.directory.glob("hidden-????.safetensors")), default=0)

    @contextmanager
    def alone(self, flag: str) -> Iterator[None]:
        """Keeps other processes off; `flag` is the argument that named the root.

        Raises:
            InputError: another process has it, or it cannot be written to.
        """
        with files.alone(self.directory, self.directory / ".lock", flag):
            files.write_atomic(self.directory / "about.json", json.dumps(self.about, indent=1))
            yield

    def __contains__(self, index: int) -> bool:
        """Whether a layer is done."""
        return self._layer(index).exists()

    def add(self, index: int, arrays: Arrays, facts: Any = None, rows: list[Rows] | None = None) -> None:
        """Keeps what is known of a layer, and the rows behind it, which replace those before."""
        _write(self._layer(index), arrays, facts)
        later = self._hidden(index + 1)
        if rows is not None and index + 1 < self.layers:
            _write(later, {f"{i}.{name}": part for i, row in enumerate(rows) for name, part in vars(row).items()})
        for old in self.directory.glob("hidden-????.safetensors"):
            if old != later:
                old.unlink()

    def read(self, index: int) -> tuple[Arrays, Any]:
        """Returns a layer's arrays and facts."""
        return _read(self._layer(index))

    def rows(self) -> list[Rows]:
        """Returns the rows that enter the first layer that is not done."""
        arrays, _ = _read(self._hidden(self.done))
        count = 1 + max(int(name.split(".")[0]) for name in arrays)
        names = Rows.__dataclass_fields__
        return [Rows(**{name: arrays[f"{i}.{name}"] for name in names}) for i in range(count)]

    def _layer(self, index: int) -> Path:
        return self.directory / f"layer-{index:04}.safetensors"

    def _hidden(self, index: int) -> Path:
        return self.directory / f"hidden-{index:04}.safetensors"


def _write(path: Path, arrays: Arrays, facts: Any = None) -> None:
    with files.atomic_file(path) as temporary:
        save(temporary, arrays, metadata={"facts": json.dumps(facts)})


def save(path: Path, arrays: Arrays, metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file; raises InputError where there is no room for it."""
    try:
        save_file(arrays, path, metadata=metadata)
    except SafetensorError as error:  # which the library makes of an OSError
        raise InputError(f"--statistics: {path.parent} cannot be written to ({error})") from error


def _read(path: Path) -> tuple[Arrays, Any]:
    try:
        with safe_open(path, "flax") as opened:
            facts = json.loads((opened.metadata() or {}).get("facts", "null"))
            # One by one: a whole file at once would be held twice.
            return {name: opened.get_tensor(name) for name in opened.keys()}, facts  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read ({error}); remove {path.parent} and run again") from error
