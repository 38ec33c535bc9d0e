"""Where a study is kept: a journal file that survives kills and power cuts, or a database."""

import contextlib
import fcntl
import os
import re
from collections.abc import Iterator
from pathlib import Path

import optuna
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend

from lmmjax.errors import InputError
from lmmjax.files import alone


def open_storage(where: str) -> BaseStorage:
    """Returns the storage at a database URL, or in a journal file at a path.

    Raises:
        InputError: it cannot be opened.
    """
    try:
        return optuna.storages.get_storage(where) if "://" in where else _journal(Path(where))
    except Exception as error:  # a database driver's own, a missing driver, a directory, a file that is no journal
        reason = " ".join(str(error).split()[:30])
        raise InputError(f"--storage: cannot open {where} ({type(error).__name__}: {reason})") from error


def only_one(where: str) -> contextlib.AbstractContextManager[None]:
    """Holds a journal file for the whole run: two searches that shared one would both do its first trials.

    A database can be on another machine, where no lock of ours reaches; there nothing is held.
    """
    if "://" in where:
        return contextlib.nullcontext()
    path = Path(where).resolve()
    return alone(path, path.with_name(f"{path.name}.running"), "--storage")


def without_password(text: str) -> str:
    """Returns the text with the passwords of the database URLs in it left out."""
    return re.sub(r"(://[^:/@\s]*):[^@\s]*@", r"\1@", text)


class FileLock:
    """A lock that the kernel takes back when its holder is killed; Optuna's own would block for 30 s then."""

    def __init__(self, path: Path):
        self._path = path.with_name(f"{path.name}.lock")
        self._descriptor = -1

    def acquire(self) -> bool:
        self._descriptor = os.open(self._path, os.O_CREAT | os.O_RDWR)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        return True

    def release(self) -> None:
        os.close(self._descriptor)


def _journal(path: Path) -> BaseStorage:
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    _drop_torn_line(path, lock)
    return JournalStorage(JournalFileBackend(str(path), lock_obj=lock))  # pyright: ignore[reportArgumentType]


def _drop_torn_line(path: Path, lock: FileLock) -> None:
    """Cuts off a last line without its end, as a power cut leaves it: appended to, it would spoil the journal."""
    if not path.exists():
        return
    with _held(lock), open(path, "r+b") as file:
        content = file.read()
        if content and not content.startswith(b'{"op_code"'):
            raise ValueError("not a journal of Optuna's")
        file.truncate(content.rfind(b"\n") + 1)


@contextlib.contextmanager
def _held(lock: FileLock) -> Iterator[None]:
    lock.acquire()
    try:
        yield
    finally:
        lock.release()
