"""The journal of a long computation: what it keeps, what a kill leaves, and what it refuses."""

import json
from pathlib import Path

import pytest

from lmmjax.errors import InputError
from lmmjax.journal import Journal


def test_steps_are_found_again(tmp_path: Path):
    path = tmp_path / "journal.jsonl"
    Journal(path, {"a": (1, 2)}).add(("x", 0), {"sum": 0.1 + 0.2, "text": "\u2028é"})
    found = Journal(path, {"a": [1, 2]})
    assert ("x", 0) in found
    assert ("x", 1) not in found
    assert found["x", 0] == {"sum": 0.1 + 0.2, "text": "\u2028é"}


def test_a_torn_last_line_is_a_step_not_done(tmp_path: Path):
    path = tmp_path / "journal.jsonl"
    journal = Journal(path, {})
    journal.add(("x", 0), 1)
    journal.add(("x", 1), 2)
    path.write_bytes(path.read_bytes()[:-3])
    found = Journal(path, {})
    assert ("x", 1) not in found
    found.add(("x", 1), 3)
    assert [json.loads(line).get("result") for line in path.read_text().splitlines()] == [None, 1, 3]


@pytest.mark.parametrize("other", [{"a": 2, "b": 1}, {"a": 1}, {"a": 1, "b": 1, "c": None, "d": 0}])
def test_other_settings_are_refused(other: dict, tmp_path: Path):
    Journal(tmp_path / "journal.jsonl", {"a": 1, "b": 1})
    with pytest.raises(InputError, match="holds results of"):
        Journal(tmp_path / "journal.jsonl", other)


def test_another_file_is_no_journal(tmp_path: Path):
    (tmp_path / "journal.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match="not a journal of ours"):
        Journal(tmp_path / "journal.jsonl", {})
