"""Files and directories that appear whole or not at all: temporary name, fsync, rename."""

import contextlib
import fcntl
import glob
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from lmmjax.errors import InputError


def write_atomic(path: str | Path, content: str | bytes) -> None:
    """Replaces the file `path` with this content; a reader sees the old file or the new one, whole.

    Raises:
        InputError: the file cannot be written there.
    """
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            file.write(data)
        _sync(temporary)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error
    _sync(path.parent)


def refuse_existing(path: Path) -> None:
    """Raises InputError if there is something at `path` already: to be asked before the work, too."""
    if path.exists() or path.is_symlink():
        raise InputError(f"{path} exists; expected a name that is free: remove it or choose another")


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
        temporary = _temporary(path)
        temporary.mkdir()
    except OSError as error:
        raise InputError(f"{path}: cannot be created ({error.strerror})") from error
    lock = _lock(temporary)
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


def _remove_abandoned(path: Path) -> None:
    """Removes what killed writers left: a living writer holds the lock on its directory."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.partial-*"):
        if leftover.is_dir() and (lock := _lock(leftover)) is not None:
            shutil.rmtree(leftover, ignore_errors=True)
            os.close(lock)


def _lock(directory: Path) -> int | None:
    """Returns a descriptor that holds the directory's lock until it is closed, or None if another has it."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
