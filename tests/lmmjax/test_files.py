"""Files and directories appear whole or not at all, also when their writer is killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lmmjax import files
from lmmjax.errors import InputError
from lmmjax.files import atomic_directory, write_atomic

KILLED = """
import os, signal, sys
from lmmjax.files import atomic_directory
with atomic_directory(sys.argv[1]) as directory:
    (directory / "half").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_write_atomic_replaces_and_makes_parents(tmp_path: Path):
    path = tmp_path / "new" / "plan.json"
    write_atomic(path, "one")
    write_atomic(path, b"two")
    assert path.read_bytes() == b"two"
    assert list(path.parent.iterdir()) == [path]


def test_a_file_that_cannot_be_written_is_one_line(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        write_atomic(tmp_path / "file" / "below", "text")


def test_a_directory_appears_when_the_block_ends(tmp_path: Path):
    path = tmp_path / "run"
    with atomic_directory(path) as directory:
        (directory / "file").write_text("text")
        assert not path.exists()
    assert (path / "file").read_text() == "text"
    assert list(tmp_path.iterdir()) == [path]


def test_an_exception_leaves_nothing(tmp_path: Path):
    def fail():
        with atomic_directory(tmp_path / "run") as directory:
            (directory / "file").write_text("text")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not list(tmp_path.iterdir())


def test_an_existing_directory_is_refused_at_once_and_again_at_the_end(tmp_path: Path):
    path = tmp_path / "run"
    with pytest.raises(InputError, match="exists"), atomic_directory(path):
        path.mkdir()  # another writer was faster
    with pytest.raises(InputError, match="exists"), atomic_directory(path):
        pytest.fail("the block must not run")
    assert list(tmp_path.iterdir()) == [path]


def test_a_killed_writer_leaves_no_visible_trace_and_the_next_cleans_up(tmp_path: Path):
    path = tmp_path / "run"
    ended = subprocess.run([sys.executable, "-c", KILLED, str(path)])
    assert ended.returncode == -signal.SIGKILL
    assert not path.exists()
    assert len(list(tmp_path.iterdir())) == 1
    with atomic_directory(path), atomic_directory(tmp_path / "other"):
        pass
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["other", "run"]


def test_a_living_writer_is_left_alone(tmp_path: Path):
    path = tmp_path / "run"
    with atomic_directory(path) as first:
        with pytest.raises(InputError, match="no, I failed"), atomic_directory(path):
            raise InputError("no, I failed")
        assert first.exists()
    assert path.exists()


def test_old_halves_of_a_file_are_removed_and_young_ones_left_alone(tmp_path: Path):
    old, young, other = (tmp_path / name for name in (".plan.partial-1", ".plan.partial-2", ".other.partial-1"))
    for path in (old, young, other):
        path.write_text("half")
    for path in (old, other):
        os.utime(path, (0, time.time() - 7200))
    write_atomic(tmp_path / "plan", "whole")
    assert set(tmp_path.iterdir()) == {young, other, tmp_path / "plan"}


def test_a_directory_taken_for_abandoned_before_it_is_locked_is_made_again(tmp_path: Path, monkeypatch):
    lock, lost = files._lock, []

    def late(directory: Path, wait: bool = False) -> int | None:
        if not lost:
            lost.append(directory)
            directory.rmdir()
        return lock(directory, wait)

    monkeypatch.setattr(files, "_lock", late)
    with atomic_directory(tmp_path / "run") as directory:
        (directory / "file").write_text("text")
    assert len(lost) == 1
    assert (tmp_path / "run" / "file").exists()


def test_a_directory_that_its_owner_renames_meanwhile_cannot_be_locked(tmp_path: Path):
    assert files._lock(tmp_path / "renamed") is None
