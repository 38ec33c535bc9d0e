"""The GPU benchmark of weight matrices: what can be run of it without one."""

import pytest

from benchmarks import machine, weights_gpu
from kernels.gpu import device


def test_a_smoke_run_shows_who_ran_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    assert weights_gpu.main(["--smoke", "--rows", "1", "--formats", "int8"]) == 0
    out = capsys.readouterr().out
    assert "tiny q 256x64, 1 rows | " in out
    assert "int8 " in out.splitlines()[1]
    assert not list(tmp_path.iterdir())


def test_without_a_gpu_it_says_so(capsys):
    if device.current() is not None:
        pytest.skip("this machine has a GPU")
    assert weights_gpu.main([]) == 2
    assert "--smoke" in capsys.readouterr().err


def row(m: int, linear: str, count: int, **us: float) -> dict:
    return {"model": "7b", "m": m, "linear": linear, "count": count, "entrants": {k: {"us": v} for k, v in us.items()}}


def test_a_layer_is_the_sum_of_its_linears():
    rows = [
        row(1, "q", 4, **{weights_gpu.PEER: 8.0, "int8": 4.0}),
        row(1, "down", 1, **{weights_gpu.PEER: 8, "int8": 9}),
    ]
    rows[1]["entrants"]["2:4"] = {"failed": "no"}
    (line,) = weights_gpu.layers(rows)
    assert "int8 1.60x (MISSED: 1.7x)" in line
    assert "2:4" not in line
