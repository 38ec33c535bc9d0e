"""Files and directories that appear whole or not at all: temporary name, fsync, rename. And lines of JSON."""

import contextlib
import fcntl
import glob
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lmmjax.errors import InputError

_ABANDONED_SECONDS = 3600
"""A file that is still being written after an hour is not: its writer was killed."""


def write_atomic(path: str | Path, content: str | bytes) -> None:
    """Replaces the file `path` with this content; a reader sees the old file or the new one, whole.

    Raises:
        InputError: the file cannot be written there.
    """
    with atomic_file(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yields a temporary name beside `path`, whose file takes that name when the block ends well.

    Raises:
        InputError: the file cannot be written there.
    """
    path = Path(path)
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned_files(path)
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    _sync(path.parent)


def read_jsonl(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Returns the objects of a file, one a line, each behind the words that say where it stands. Blank lines are none.

    Raises:
        InputError: the file cannot be read, a line is no JSON object, or there is none.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or 'not UTF-8'})") from error
    rows = []
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{where}: no JSON ({error.msg}); expected one object a line") from None
        if not isinstance(row, dict):
            raise InputError(f"{where}: no JSON object ({type(row).__name__}); expected one a line")
        rows.append((where, row))
    if not rows:
        raise InputError(f"{path}: nothing in it; expected one JSON object a line")
    return rows


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file; raises InputError if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: got a {type(content).__name__}, expected a JSON object")
    return content


def refuse_existing(path: Path) -> None:
    """Raises InputError if there is something at `path` already: to be asked before the work, too."""
    if path.exists() or path.is_symlink():
        raise InputError(f"{path} exists; expected a name that is free: remove it or choose another")


@contextlib.contextmanager
def alone(what: Path, lock: Path, flag: str) -> Iterator[None]:
    """Holds `lock`, the sign that this process writes to `what`; the kernel lets go of it however it ends.

    Raises:
        InputError: another process holds it, or it cannot be made; `flag` is the argument that named `what`.
    """
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(lock, os.O_CREAT | os.O_RDWR)
    except OSError as error:
        raise InputError(f"{flag}: cannot write to {what} ({error.strerror})") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{flag}: another process is writing to {what}; wait for it, or give another {flag}"
            ) from None
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Yields an empty temporary directory beside `path`, which takes that name when the block ends well.

    After an exception it is removed. After a kill or a power cut it stays, hidden and never under the name
    `path`; the next call for the same path removes it.

    Raises:
        InputError: `path` exists, or its parent cannot be written to.
    """
    path = Path(path)
    refuse_existing(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path)
        temporary, lock = _claim(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be created ({error.strerror})") from error
    try:
        yield temporary
        for entry in temporary.rglob("*"):
            _sync(entry)
        _sync(temporary)
        _rename(temporary, path)
        _sync(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        if lock is not None:
            os.close(lock)


def _rename(temporary: Path, path: Path) -> None:
    """Renames without ever replacing: two writers of one path may end at the same time."""
    try:
        refuse_existing(path)
        temporary.rename(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be created ({error.strerror})") from error


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial-{uuid.uuid4().hex[:8]}")


def _leftovers(path: Path) -> Iterator[Path]:
    return path.parent.glob(f".{glob.escape(path.name)}.partial-*")


def _remove_abandoned_files(path: Path) -> None:
    for leftover in _leftovers(path):
        with contextlib.suppress(OSError):  # another process removes it at the same time
            if leftover.is_file() and time.time() - leftover.stat().st_mtime > _ABANDONED_SECONDS:
                leftover.unlink()


def _claim(path: Path) -> tuple[Path, int | None]:
    """Returns a new temporary directory and its lock (None where the file system has no locks).

    Until it is locked another process may take it for abandoned and remove it; then a new one is made.
    """
    while True:
        temporary = _temporary(path)
        temporary.mkdir()
        lock = _lock(temporary, wait=True)
        if temporary.exists():
            return temporary, lock
        if lock is not None:
            os.close(lock)


def _remove_abandoned(path: Path) -> None:
    """Removes what killed writers left: a living writer holds the lock on its directory."""
    for leftover in _leftovers(path):
        if leftover.is_dir() and (lock := _lock(leftover)) is not None:
            shutil.rmtree(leftover, ignore_errors=True)
            os.close(lock)


def _lock(directory: Path, wait: bool = False) -> int | None:
    """Returns a descriptor that holds the directory's lock until it is closed.

    None if it cannot be had: the directory is gone, another process has the lock (unless it is waited for), or
    the file system knows none.
    """
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
