"""The tables of docs/results.md: they are what the figures give, and a figure is what it says."""

import json
from pathlib import Path

from benchmarks import gpu_headlines, machine, results


def test_the_page_is_what_the_figures_give():
    assert results.TARGET.read_text() == results.page(machine.RESULTS), "run python -m benchmarks.results"


def test_the_readme_has_the_ratios_that_the_figures_give():
    found = gpu_headlines.README.read_text()
    assert found == gpu_headlines.shown(found, machine.RESULTS, results.HEADLINES), "run python -m benchmarks.results"
    steps = json.loads((machine.RESULTS / f"model-7b-{results.HEADLINES}.json").read_text())["cases"]
    whole, narrow = (steps[f"32x4096 kv{bits} bf16"]["ms"] for bits in (16, 4))
    assert f"| {whole / narrow:.2f}: ours with 16 bits, {whole:.2f} ms |" in found


def example(folder: Path, **changes) -> Path:
    def row(axis: str, level: str, method: str, seed: int, right: float, ppl: float | None = 9.0) -> dict:
        quality = {"right": right, "by_kind": dict.fromkeys(results.KINDS, right), "kl": 0.5, "ppl": ppl}
        return {"axis": axis, "level": level, "method": method, "seed": seed, **quality}

    cells = [
        row("dense", "", "dense", 0, 0.99),
        row("weights", "2:4", "wanda", 0, 0.5),
        row("weights", "0.6", "magnitude", 0, 0.25, None),
        row("weights", "0.5", "wanda", 0, 0.8),
        row("weights", "0.5", "wanda", 1, 0.9),
        row("cache", "3", "uniform", 0, 0.7),
        row("cache", "8", "uniform", 0, 0.75),
    ]
    text = {"files": ["2000.txt", "2021.txt"], "windows": 8, "context": 512, "stride": 512}
    settings = {"model": "small", "calibration": 8, "search": 8, "samples": 100, "trials": 5, "text": text}
    versions = {"jax": "1.2.3"}
    about = {"cpu": "Abacus", "cores_used": 2, "device": "cpu", "date": "2030-01-02T03", "command": "python -m x"}
    path = folder / "quality-small.json"
    path.write_text(
        json.dumps({"about": {**about, "versions": versions}, "settings": {**settings, **changes}, "cells": cells})
    )
    return path


def test_rows_go_from_dense_to_severe_with_the_spread_over_seeds(tmp_path):
    example(tmp_path)
    weights, cache = results.page(tmp_path).split("### KV cache")
    rows = [line for line in weights.splitlines() if line.startswith("| ") and "%" in line]
    assert [row.split(" | ")[0] for row in rows] == ["| ", "| 50%", "| 60%", "| 2:4"]
    assert rows[1].startswith("| 50% | wanda | 85.0 ± 7.1% | 85.0 ± 7.1% |")
    assert rows[2].endswith("| 0.5 | ∞ |")
    assert cache.index("| 8 | uniform") < cache.index("| 3 | uniform")


def test_the_small_print_says_what_the_figures_rest_on(tmp_path):
    example(tmp_path)
    page = results.page(tmp_path)
    for said in ("100 questions", "±9.6 points", "Abacus, 2 cores", "jax 1.2.3", "2030-01-02", "`python -m x`"):
        assert said in page
    assert "8 windows of 512 tokens" in page


def test_without_text_there_is_no_perplexity(tmp_path):
    example(tmp_path, text=None)
    page = results.page(tmp_path).removeprefix(results.INTRODUCTION)
    assert "perplexity |" not in page
    assert "No perplexity" in page


def test_memory_is_a_row_a_method_and_depth(tmp_path):
    def row(layers: int, method: str, peak: float) -> dict:
        return {"layers": layers, "method": method, "gigabytes": layers / 2, "peak_gigabytes": peak, "seconds": 9.6}

    about = {"cpu": "Abacus", "cores_used": 2, "device": "cpu", "date": "2030-01-02T03", "command": "c", "versions": {}}
    rows = [row(4, "wanda", 6.04), row(2, "wanda", 5.96), row(2, "sparsegpt", 7)]
    found = {"about": about, "rows": rows, "settings": {"windows": 4, "length": 512}}
    (tmp_path / "prune-memory.json").write_text(json.dumps(found))
    page = results.page(tmp_path)
    shown = [line for line in page.splitlines() if line.startswith(("| wanda", "| sparsegpt"))]
    assert shown == [
        "| sparsegpt | 2 | 1.0 GB | 7.0 GB |",
        "| wanda | 2 | 1.0 GB | 6.0 GB |",
        "| wanda | 4 | 2.0 GB | 6.0 GB |",
    ]
    assert "Calibrated on 4 x 512 tokens" in page
    assert "hidden states are 4.3 GB" in page


def test_speed_is_a_row_a_method_and_a_column_a_linear(tmp_path):
    def row(linear: str, method: str, pattern: str | None, speedup: float) -> dict:
        seconds = {"seconds": {"median": 0.0123}}
        shape = {"q": [8, 8], "down": [16, 8]}[linear]
        names = {"linear": linear, "method": method, "pattern": pattern, "shape": shape}
        return {**names, "lmmjax": seconds, "speedup": speedup, "same_mask": 0.99994}

    about = {"cpu": "Abacus", "cores_used": 1, "device": "cpu", "date": "2030-01-02T03", "command": "c", "versions": {}}
    rows = [row("q", "wanda", None, 5.04), row("q", "admm", "2:4", 0.96), row("down", "wanda", None, 2)]
    (tmp_path / "prune-smol-cpu.json").write_text(json.dumps({"about": about, "rows": rows}))
    page = results.page(tmp_path)
    assert "| torch's time / ours | q 8 x 8 | down 16 x 8 |" in page
    assert "| wanda | 5.0x (12.3 ms) | 2.0x (12.3 ms) |" in page
    assert "| admm 2:4 | 1.0x (12.3 ms) | - |" in page
    assert "99.99% of them at least" in page
