"""The generation benchmark runs both sides on the same weights and writes figures that can be read later."""

import importlib.util
import json
from pathlib import Path

import pytest
from tiny_checkpoints import hf_config

from benchmarks import generate, machine


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="the peer is transformers on torch")
def test_both_sides_say_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    monkeypatch.setattr(generate, "REST_SECONDS", 0)
    monkeypatch.setitem(generate.CASES, "tiny", hf_config())
    assert generate.main(["--case", "tiny", "--tokens", "6", "--repeats", "3", "--name", "test"]) == 0
    written = json.loads((tmp_path / "test.json").read_text())
    for fact in ("date", "cpu", "cores", "command", "versions"):
        assert written["about"][fact]
    case = written["cases"]["tiny"]
    assert case["same_tokens"] is True
    for side in ("lmmjax", "transformers"):
        for figure in ("first_token_ms", "decode_tokens_per_s"):
            assert sorted(case[side][figure]["runs"])[1] == case[side][figure]["median"] > 0
    assert "same tokens: True" in capsys.readouterr().out
