"""What layers cost by themselves: each is pruned alone, a run goes on, and a table says which allocation fits."""

import json

import pytest

from benchmarks import machine, prune_layers, prune_quality, prune_table
from lmmjax import checkpoint as checkpoints
from lmmjax.prune.allocations import ALLOCATIONS


@pytest.mark.slow
def test_each_layer_is_pruned_alone_and_a_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", ["prune_layers.py"])
    words = ["--samples", "8", "--calibration-samples", "8", "--batch", "8", "--levels", "0.6"]
    assert prune_layers.main(words) == 0
    path = tmp_path / "prune-layers-tiny.json"
    found = json.loads(path.read_text())
    layers = len(found["layers"])
    assert [row["layer"] for row in found["layers"]] == list(range(layers))
    for row in found["layers"]:
        assert row["sparsity"] == pytest.approx(0.6 / layers, abs=2e-3)
        assert row["kl"] > 0
        assert set(row["dropped"]) == set(ALLOCATIONS)
    for name in ALLOCATIONS:
        assert sum(row["dropped"][name] for row in found["layers"]) == pytest.approx(0.6 * layers, abs=1e-3)
    monkeypatch.setattr(prune_quality.Contest, "measure", None)  # whoever measures again, fails
    assert prune_layers.main(words) == 0
    assert prune_table.layers(path.name, found).count("| 60% |") == 3
    assert checkpoints.EMBEDDED.name == found["settings"]["model"]


def test_the_correlation_is_of_ranks():
    costs = [0.1, 5.0, 0.2, 0.3]
    shares = {
        "owl": [0.7, 0.4, 0.6, 0.5],
        "das": [0.1, 0.9, 0.2, 0.3],
        "mgaa": [0.5, 0.5, 0.5, 0.5001],  # alike: one input more here or there
        "ecoflap": [0.5, 0.7, 0.7, 0.7],
    }
    rows = [
        {
            "level": "0.5",
            "layer": i,
            "text_kl": cost,
            "dropped": {name: shares.get(name, [0.1, 0.4, 0.3, 0.2])[i] for name in ALLOCATIONS},
        }
        for i, cost in enumerate(costs)
    ]
    about = {"cpu": "c", "cores_used": 2, "device": "cpu", "versions": {}, "date": "2026-11-26T00:00:00"}
    text = {"files": ["a.txt"], "windows": 1, "context": 8, "stride": 8}
    settings = {"samples": 8, "calibration_samples": 8, "calibration_windows": 1, "calibration": [], "length": 8}
    page = prune_table.layers("x.json", {"layers": rows, "settings": settings | {"text": text}, "about": about})
    line = next(line for line in page.splitlines() if "rank correlation |" in line)
    cells = dict(zip([name for name in ALLOCATIONS if name != "uniform"], line.split(" | ")[2:], strict=True))
    assert cells["owl"].startswith("-1.00")
    assert cells["das"].startswith("+1.00")
    assert cells["mgaa"].startswith("-")
    assert cells["ecoflap"] == "+0.77"
    assert "layers 1 (5.000), 3 (0.300)" in page
    assert "| 50% | of layer 1, the dearest | 40% | 40% | 70% | 90% | 50% |" in page
