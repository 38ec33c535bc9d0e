"""What a long computation has done so far: a line of JSON a step, appended, so that a killed run goes on."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lmmjax.errors import InputError
from lmmjax.files import write_atomic

Step = tuple[str, int]
"""A part of the computation by name, and a number within it."""


class Journal:
    """The results of finished steps; the first line of the file holds the settings they were computed under."""

    def __init__(self, path: Path, settings: Mapping[str, Any]):
        """Opens the journal, or begins one.

        Raises:
            InputError: it was written under other settings, is no journal, or cannot be written.
        """
        self._path = path
        if not path.exists():
            write_atomic(path, _line({"settings": settings}))
        try:
            self._results = dict(_steps(path, settings))
        except OSError as error:
            raise InputError(f"{path}: cannot be read or written ({error.strerror})") from error

    def __contains__(self, step: Step) -> bool:
        return step in self._results

    def __getitem__(self, step: Step) -> Any:
        return self._results[step]

    def add(self, step: Step, result: Any) -> None:
        """Appends a step's result; it is on the disk when this returns."""
        name, number = step
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(_line({"step": [name, number], "result": result}))
            file.flush()
            os.fsync(file.fileno())
        self._results[step] = result


def _steps(path: Path, settings: Mapping[str, Any]) -> Iterator[tuple[Step, Any]]:
    """Yields the steps in a journal, a line without its end (the writer was killed) cut off first."""
    with open(path, "r+b") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
    try:
        first, *rest = [json.loads(line) for line in content[: content.rfind(b"\n") + 1].splitlines()]
        found = first["settings"]
        steps = [((name, number), row["result"]) for row in rest for name, number in [row["step"]]]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a journal of ours ({error}); remove it or give another --out") from error
    asked = json.loads(_line(settings))
    changed = [name for name in {**found, **asked} if found.get(name) != asked.get(name)]
    if changed:
        name = changed[0]
        raise InputError(
            f"--out: {path.parent} holds results of {name} {found.get(name)!r}, now it is {asked.get(name)!r}; give the"
            " same settings to go on, or another --out"
        )
    yield from steps


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
