"""The quality benchmark: every cell is what it says, a run goes on where it stopped, and text is judged too."""

import json

import numpy as np
import pytest

from benchmarks import machine, quality
from benchmarks.contest import cells

pytestmark = pytest.mark.slow

SMALL = "--samples 6 --search-samples 4 --calibration-samples 4 --trials 2 --batch 2 --seeds 1 --name test".split()


def test_seed_0_comes_first_and_what_has_no_choice_is_not_searched():
    found = cells(["0.5", "2:4"], [4, 3, 2], seeds=2)
    assert len(found) == len(set(found)) == 1 + (2 + 3) + 2 * (4 + 1 + 2)
    assert [cell.seed for cell in found] == sorted(cell.seed for cell in found)
    searched = {(cell.axis, cell.level) for cell in found if cell.method == "searched"}
    assert searched == {("weights", "0.5"), ("cache", "4"), ("cache", "3")}


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    return tmp_path / "quality-test.json"


def test_cells_are_what_they_say_and_a_run_goes_on_where_it_stopped(checkpoint, results, tmp_path, capsys):
    (tmp_path / "speech.txt").write_text("Four score and seven years ago " * 8)
    given = ["--model", str(checkpoint), *SMALL, "--text", str(tmp_path), "--context", "32", "--stride", "32"]
    assert quality.main([*given, "--sparsity", "0.5", "--bits", "2"]) == 0
    first = json.loads(results.read_text())
    assert quality.main([*given, "--sparsity", "0.5", "2:4", "--bits", "2", "3"]) == 0
    found = json.loads(results.read_text())
    assert found["cells"][: len(first["cells"])] == first["cells"]
    rows = {(row["level"], row["method"]): row for row in found["cells"]}
    assert len(rows) == len(found["cells"]) == len(cells(["0.5", "2:4"], [2, 3], 1))
    assert found["settings"]["text"]["files"] == ["speech.txt"]
    assert rows["", "dense"]["kl"] == 0
    assert all(row["kl"] > 0 for key, row in rows.items() if key[1] != "dense")
    assert all(np.isfinite(row["ppl"]) for row in rows.values())
    assert rows["0.5", "searched"]["kept"] == pytest.approx(rows["0.5", "wanda"]["kept"], abs=0.01)
    assert rows["0.5", "wanda"]["kl"] != rows["2:4", "wanda"]["kl"]
    assert rows["3", "searched"]["kv_bytes"] <= rows["3", "uniform"]["kv_bytes"]
    assert rows["2", "uniform"]["kv_bytes"] < rows["3", "uniform"]["kv_bytes"]
    assert quality.main([*given, "--context", "16", "--stride", "16"]) == 2
    assert "holds figures of other settings" in capsys.readouterr().err
