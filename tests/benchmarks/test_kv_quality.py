"""The cache's benchmark: its judge is the search's, bits are the formula's, a run goes on, and text is judged too."""

import dataclasses
import json

import numpy as np
import pytest

from benchmarks import kv_quality, kv_table, machine
from benchmarks.kv_judge import Judge, Widths, sizes
from benchmarks.kv_peers import kivi
from benchmarks.kv_rows import OURS, rows
from lmmjax import calibrate, data, perplexity
from lmmjax.checkpoint import load
from lmmjax.perplexity import Window
from lmmjax.plan import uniform
from lmmjax.prompt import Processor
from lmmjax.prune.transform import rank_model
from search.objective import Evaluator
from search.space import dense

pytestmark = pytest.mark.slow

SMALL = "--samples 6 --calibration-samples 4 --batch 2 --no-peers --contexts 96".split()


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    return tmp_path


def test_a_run_goes_on_where_it_stopped_and_says_what_it_found(checkpoint, results, capsys):
    (results / "speech.txt").write_text("Four score and seven years ago " * 8)
    given = ["--model", str(checkpoint), *SMALL, "--text", str(results), "--context", "48", "--stride", "48"]
    assert kv_quality.main([*given, "--methods", "KIVI"]) == 0
    (path,) = results.glob("kv-quality-*.json")
    first = json.loads(path.read_text())["rows"]
    assert kv_quality.main([*given, "--methods", "KIVI", "ours", "ours, image tokens 2"]) == 0
    found = json.loads(path.read_text())
    assert found["rows"][: len(first)] == first
    quality = {(row["method"], row["level"]): row for row in found["rows"]}
    assert len(quality) == len(found["rows"]) == 1 + 3 + 3 + 2
    assert quality["dense", ""]["kl"] == quality["dense", ""]["text_kl"] == 0
    for method in ("KIVI", "ours"):
        losses = [quality[method, bits]["text_kl"] for bits in "432"]
        assert losses == sorted(losses)
        assert losses[0] > 0
    assert quality["ours, image tokens 2", "4"]["kl"] != quality["ours", "4"]["kl"]
    assert quality["ours, image tokens 2", "4"]["text_kl"] == pytest.approx(quality["ours", "4"]["text_kl"], abs=1e-5)
    assert kv_table.page(found) in capsys.readouterr().out
    assert kv_quality.main([*given, "--samples", "5"]) == 2
    assert "holds figures of other settings" in capsys.readouterr().err


def test_the_judge_is_the_searchs_and_the_text_is_perplexitys(checkpoint):
    model = load(checkpoint)
    questions = data.encode(Processor.load(model.path, model.config), data.load(data.EASY_VQA, "test")[:4])
    tokens = np.random.default_rng(0).integers(0, 90, 96).tolist()
    windows = [Window(0, tokens[:48], 1), Window(0, tokens[40:80], 8), Window(1, tokens[60:], 1)]
    layers = model.config.text.layers
    form = dataclasses.replace(kivi(), dtype="float32")  # else the search's dense predictions would be rounded, too
    widths = Widths(np.full(layers, 3), np.full(layers, 2))
    found = Judge(model, questions, windows, batch=2)(form, widths)
    statistics = calibrate.statistics(model.config, model.params, questions)
    ranks = rank_model(model.config, model.params, statistics, "magnitude")
    searched = Evaluator(model.config, model.params, ranks, form, questions, batch=2)
    candidate = dense(layers)._replace(key_bits=widths.keys, value_bits=widths.values)
    assert found["kl"] == pytest.approx(searched(candidate).kl, rel=1e-3)
    plan = uniform(model.config.text, bits=3, cache=kivi())
    three = Judge(model, questions, windows, batch=2)(kivi(), Widths(np.full(layers, 3), np.full(layers, 3)))
    scored = perplexity.gather(list(perplexity.score(model.config, model.params, plan, windows, context=48)))
    assert three["ppl"] == pytest.approx(scored.ppl, rel=1e-4)


def test_true_bits_are_the_formula(checkpoint):
    model = load(checkpoint)
    text = model.config.text
    for bits in (8, 4, 2):  # heads of 8 channels fill no word of a 1-bit plane
        alike = Widths(np.full(text.layers, bits), np.full(text.layers, bits))
        found = sizes(model, OURS, alike, 2048)
        group = np.gcd(32, text.head_dim)  # of values; keys' run along tokens
        assert found["codes"] == pytest.approx(bits, rel=0.03)  # room for one more group than the sink leaves
        assert found["scales"] == pytest.approx((16 / 32 + 16 / group) / 2, rel=0.03)
        assert found["exact"] == pytest.approx(16 * (32 + 1 + 1) / 2 / 2048)
        assert found["all"] == pytest.approx(found["codes"] + found["scales"] + found["exact"])


def test_every_row_has_a_name_and_a_level_of_its_own(checkpoint):
    found = rows(load(checkpoint).config.text)
    assert len({(row.method, kv_quality._level(row)) for row in found}) == len(found)
