"""The pruning benchmark: cells that mean something, once each; figures kept and not measured again; and its tables."""

import json

import pytest
from said import one_line

from benchmarks import kv_quality, machine, prune_quality, prune_table, quality
from benchmarks.prune_cells import Cell, cells
from lmmjax import checkpoint as checkpoints
from lmmjax.pack import __main__ as pack
from lmmjax.prune.allocations import ALLOCATIONS
from lmmjax.prune.method import NAMES


def test_cells_are_every_score_with_every_update_and_every_allocation():
    found = list(cells(["0.5", "2:4"], 2))
    assert len(found) == len(set(found))
    first = [cell for cell in found if cell.seed == 0 and cell.level == "0.5"]
    assert {cell.score for cell in first} == set(NAMES)
    assert {cell.allocation for cell in first} == set(ALLOCATIONS)
    assert len(first) == 6 * 3 + 2 + 5
    assert {cell.allocation for cell in found if cell.level == "2:4"} == {"uniform"}
    assert [cell.method.label for cell in found if cell.score == "sparsegpt"][:1] == ["sparsegpt"]
    permuted = [cell for cell in found if cell.permute and cell.seed == 0]
    assert {cell.level for cell in permuted} == {"2:4"}
    assert {cell.method.label for cell in permuted} >= {"ria, permuted", "lognorm + admm, permuted"}
    row = Cell("0.5", "wanda", seed=1)._asdict()
    assert Cell.of({**row, "right": 0.5}) == Cell.of({name: row[name] for name in row if name != "permute"})


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    monkeypatch.setattr("sys.argv", ["prune_quality.py"])
    return tmp_path


@pytest.mark.slow
def test_it_measures_and_goes_on_where_it_stopped(results, monkeypatch, capsys):
    """The embedded model at two levels with few questions: exact, resumable, and a table of it."""
    wanted = [Cell(""), Cell("0.6", "wanda"), Cell("0.6", "wanda", "sparsegpt"), Cell("0.6", "lognorm", "none", "mgaa")]
    monkeypatch.setattr(prune_quality, "cells", lambda levels, seeds: wanted)
    words = ["--samples", "8", "--calibration-samples", "8", "--batch", "8"]
    assert prune_quality.main(words) == 0
    path = results / "prune-quality-tiny.json"
    found = json.loads(path.read_text())
    assert [Cell.of(row) for row in found["cells"]] == wanted
    assert all(row["sparsity"] == pytest.approx(0.6, abs=1e-3) for row in found["cells"][1:])
    assert all(row["right"] > 0.5 for row in found["cells"])
    monkeypatch.setattr(checkpoints, "load", None)  # whoever measures again, fails
    assert prune_quality.main(words) == 0
    table = prune_table.page(path.name, found)
    assert table.count("| 60% |") == 1 + 2  # wanda, and two measures of allocations
    right = f"{100 * found['cells'][2]['right']:.1f}%"
    assert right in next(line for line in table.splitlines() if line.startswith("| 60% | wanda |"))


def test_tables_take_means_over_seeds():
    cell = {"level": "2:4", "score": "ria", "update": "admm", "allocation": "uniform"}
    cells = [
        {**cell, "level": "", "score": "", "update": "none", "right": 1.0, "ppl": 8.0, "kl": 0.0},
        {**cell, "right": 0.5, "ppl": 10.0, "kl": 0.5},
        {**cell, "right": 0.7, "ppl": 14.0, "kl": 0.7},
        {**cell, "score": "admm", "right": 0.25, "ppl": 9.0},
        {**cell, "update": "none", "permute": True, "right": 0.3, "ppl": 11.0},
    ]
    settings = {"samples": 8, "calibration_samples": 4, "calibration_windows": 2, "length": 16}
    settings |= {"calibration": ["a.txt"], "text": {"files": ["b.txt"], "windows": 1, "context": 16, "stride": 16}}
    about = {"cpu": "Abacus", "cores_used": 2, "device": "cpu", "date": "2030-01-02T03", "versions": {"jax": "1.2.3"}}
    page = prune_table.page("x.json", {"cells": cells, "settings": settings, "about": about})
    assert "|  | dense | 100.0% |  |  | 8.0 |  |  |" in page
    assert "| 2:4 | ria | - | - | 60.0 ± 14.1% | - | - | 12.0 ± 2.8 |" in page
    assert "| 2:4 | ria, permuted | 30.0% | - | - | 11.0 | - | - |" in page
    assert "| 2:4 | own mask | - | - | 25.0% | - | - | 9.0 |" in page
    page = prune_table.page("x.json", {"cells": cells[:3], "settings": settings | {"text": None}, "about": about})
    assert "| 2:4 | ria | - | - | 60.0 ± 14.1% | - | - | 0.600 ± 0.141 |" in page


@pytest.mark.parametrize("benchmark", [prune_quality, kv_quality, quality])
def test_what_is_compressed_already_is_refused(benchmark, results, checkpoint, tmp_path_factory, capsys):
    small = tmp_path_factory.mktemp("packed") / "small"
    assert pack.main(["--model", str(checkpoint), "--bits", "8", str(small)]) == 0
    capsys.readouterr()
    assert benchmark.main(["--model", str(small)]) == 2
    assert "is compressed already" in one_line(capsys)
    assert not list(results.iterdir())
