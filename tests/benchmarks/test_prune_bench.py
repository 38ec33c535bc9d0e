"""The pruning benchmark: both sides prune the same weights alike, and what is written can be read later."""

import importlib.util
import json

import numpy as np
import pytest

from benchmarks import machine, prune

pytestmark = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="the peers are in torch")


def run(tmp_path, monkeypatch, *arguments) -> int:
    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    monkeypatch.setattr(prune, "REST_SECONDS", 0)
    return prune.main(list(arguments))


SHAPE = (136, 12)
"""Inputs: more than a block of either side, and no whole number of blocks."""


def test_both_sides_end_with_the_same_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(prune.SHAPES, "smol", {"q": SHAPE, "left-out": (8, 8)})
    assert run(tmp_path, monkeypatch, "--linears", "q", "--rounds", "3") == 0
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("prune-smol-")
    written = json.loads(path.read_text())
    assert written["about"]["versions"]["torch"]
    assert [(row["method"], row["pattern"]) for row in written["rows"]] == [
        ("wanda", None),
        ("sparsegpt", None),
        ("sparsegpt", "2:4"),
        ("admm", None),
        ("admm", "2:4"),
    ]
    for row in written["rows"]:
        medians = [sorted(row[side]["seconds"]["runs"])[1] for side in ("lmmjax", "torch")]
        assert row["speedup"] == medians[1] / medians[0]
        assert row["same_mask"] == 1
        assert row["difference"] < 1e-5
        assert row["lmmjax_error"] == pytest.approx(row["torch_error"], rel=1e-4)
    errors = {(row["method"], row["pattern"]): row["lmmjax_error"] for row in written["rows"]}
    assert errors["admm", None] < errors["sparsegpt", None] < errors["wanda", None]
    assert "admm 2:4 136x12" in capsys.readouterr().out


def test_a_smoke_run_leaves_no_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prune, "SMOKE", {"q": SHAPE})  # compiled already
    assert run(tmp_path, monkeypatch, "--smoke") == 0
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().out.count("same mask") == 5


def test_a_linear_that_is_none_is_refused(tmp_path, monkeypatch, capsys):
    assert run(tmp_path, monkeypatch, "--linears", "v") == 2
    assert "--linears: got v, expected some of q, k, gate, down" in capsys.readouterr().err


def test_agreement_counts_masks_and_measures_what_an_output_lost():
    """Inputs of second moments 1 and 4, each alone: dropping the second's weight loses 4 of the square's 5."""
    linear = prune.Linear(np.ones((2, 1), np.float32), np.diag([1.0, 4.0]).astype(np.float32))
    found = prune.agreement(linear, np.array([[1.0], [0]]), np.array([[0.0], [1]]))
    assert found["same_mask"] == 0
    assert found["lmmjax_error"] == pytest.approx((4 / 5) ** 0.5)
    assert found["torch_error"] == pytest.approx((1 / 5) ** 0.5)
    assert found["difference"] == pytest.approx(2**0.5)
