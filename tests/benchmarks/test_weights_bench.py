"""The benchmark of packed weights: every format is timed and counted, and a side says what it wrote and took."""

import json

import pytest

from benchmarks import decode_side, weights_products, weights_table
from kernels.weights import WeightFormat
from lmmjax import checkpoint

pytest.importorskip("torch", reason="torch is the peer")


def test_products_are_timed_in_every_format(monkeypatch):
    monkeypatch.setattr(weights_products, "_stream", lambda: 1e9)
    found = weights_products.measure(1, {"small": (64, 32)})["shapes"]["small"]
    assert {"XLA, float32", "torch, float32", "torch, bfloat16", "torch, int8"} < found.keys()
    for kind, bits in weights_products.FORMATS:
        one = found[f"{kind}, {bits} bits"]
        assert one["bytes"] == WeightFormat(kind, bits, 64 if bits == 4 else None).nbytes(64, 32, 32)
        assert one["of_stream"] == pytest.approx(1e3 * one["bytes"] / one["ms"]["median"] / 1e9)


def test_a_side_says_what_it_wrote_and_took(capsys):
    path = checkpoint.resolve(None)
    assert decode_side.main(["lmmjax", str(path), "--tokens", "4", "--repeats", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["ms"]) == 2
    assert len(found["ids"]) == 4
    assert 8e6 < found["weights_bytes"] < found["peak_bytes"]


def test_a_table_has_ratios_to_transformers():
    def side(ms: float) -> dict:
        return {"ms_per_token": {"median": ms, "runs": [ms]}, "weights_bytes": 2e6, "peak_bytes": 3e6}

    about = {"cpu": "Abacus", "cores_used": 2, "device": "cpu", "date": "2030-01-02T03", "command": "x", "versions": {}}
    product = {"ms": {"median": 0.5}, "bytes_per_s": 2e9, "of_stream": 0.25}
    found = {
        "decode": {
            "about": about,
            "model": "m",
            "tokens": 4,
            "sides": {weights_table.PEER: side(30), "ours": side(10)},
        },
        "products": {"about": about, "shapes": {"a": {"ours": product}, "b": {}}},
    }
    page = weights_table.page("w.json", found)
    assert "| ours | 10.0 | 10.0 | 3.00x | 2 MB | 3 MB |" in page
    assert "| ours | 0.50 (2.0, 25%) | - |" in page
