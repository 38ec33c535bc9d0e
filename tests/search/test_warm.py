"""Starts from a measured sensitivity: the best there is within the bytes, and the first that a search evaluates."""

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest

from lmmjax import checkpoint as checkpoints
from lmmjax import sensitivity
from lmmjax.config import TextConfig
from lmmjax.errors import InputError
from lmmjax.plan import CacheFormat
from lmmjax.prune.budget import WeightBudget
from search import knapsack, session, tpe, warm
from search.cache_budget import CacheBudget
from search.knapsack import Pair
from search.settings import Settings
from search.space import Space
from search.storage import open_storage
from search.warm import WIDTHS, Measured

TEXT = TextConfig(vocab=64, width=64, ffn=176, layers=4, heads=4, kv_heads=2, head_dim=16, context=512)
SPACE = Space(WeightBudget(TEXT, 0.5), CacheBudget(TEXT, 0.4, 512, CacheFormat()))


def measured(seed: int = 0, layers: int = TEXT.layers) -> Measured:
    """Hurt that falls by about four with each bit, a level of its own for every layer and side."""
    rng = np.random.default_rng(seed)

    def table() -> np.ndarray:
        level = 10 ** rng.uniform(-2, 2, (layers, 1))
        return level * np.array([4.0**-bits for bits in WIDTHS]) * rng.uniform(0.7, 1.4, (layers, len(WIDTHS)))

    return Measured(table(), table())


def random_layers(seed: int, count: int = 4) -> list[list[Pair]]:
    rng = np.random.default_rng(seed)
    return [
        [Pair(8, i, int(rng.integers(10, 90)), float(rng.uniform())) for i in range(rng.integers(1, 6))]
        for _ in range(count)
    ]


def best_of_all(layers: list[list[Pair]], nbytes: int) -> float:
    every = itertools.product(*layers)
    return min(sum(p.hurt for p in chosen) for chosen in every if sum(p.nbytes for p in chosen) <= nbytes)


@pytest.mark.parametrize("seed", range(8))
def test_the_knapsack_finds_the_best_of_all_choices(seed: int):
    layers = random_layers(seed)
    least, most = (sum(end(p.nbytes for p in layer) for layer in layers) for end in (min, max))
    for nbytes in (least, (least + most) // 2, most, most + 50):
        chosen = knapsack.knapsack(layers, nbytes)
        assert all(pair in layer for pair, layer in zip(chosen, layers, strict=True))
        assert sum(pair.nbytes for pair in chosen) <= nbytes
        assert sum(pair.hurt for pair in chosen) == pytest.approx(best_of_all(layers, nbytes))
        # What is dominated is never missed.
        kept = [knapsack.undominated(layer) for layer in layers]
        assert sum(p.hurt for p in knapsack.knapsack(kept, nbytes)) == pytest.approx(best_of_all(layers, nbytes))
    with pytest.raises(ValueError, match=f"got {least - 1}, expected at least {least}"):
        knapsack.knapsack(layers, least - 1)


def test_a_coarse_knapsack_stays_within_the_bytes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(knapsack, "CELLS", 9)
    layers = random_layers(3)
    least = sum(min(p.nbytes for p in layer) for layer in layers)
    for nbytes in range(least, least + 200, 17):
        assert sum(pair.nbytes for pair in knapsack.knapsack(layers, nbytes)) <= nbytes


def test_the_pairs_are_those_that_no_other_beats():
    found = measured()
    tables = SPACE.cache.side_bytes
    for layer, kept in enumerate(warm.pairs(found, SPACE.cache)):
        every = {
            (k, v): (
                tables["keys"][k] + tables["values"][v],
                found.hurt("keys", layer, k) + found.hurt("values", layer, v),
            )
            for k in (16, *WIDTHS)
            for v in (16, *WIDTHS)
        }
        best = {
            pair
            for pair, (size, hurt) in every.items()
            if not any(a <= size and b <= hurt and (a, b) != (size, hurt) for a, b in every.values())
        }
        assert {(pair.key_bits, pair.value_bits) for pair in kept} == best
        assert all((pair.nbytes, pair.hurt) == every[pair.key_bits, pair.value_bits] for pair in kept)
        assert 2 < len(kept) < len(every)


@pytest.mark.parametrize("seed", range(3))
def test_a_start_is_on_the_budget_and_better_than_uniform(seed: int):
    found = measured(seed)
    (start,) = warm.starts([found, found], SPACE)
    assert SPACE.cache.share(start.key_bits, start.value_bits) <= 0.4
    np.testing.assert_array_equal(start.drops, SPACE.weights.uniform())

    def hurt(keys: np.ndarray, values: np.ndarray) -> float:
        return sum(
            found.hurt("keys", i, int(k)) + found.hurt("values", i, int(v))
            for i, (k, v) in enumerate(zip(keys, values, strict=True))
        )

    ours = hurt(start.key_bits, start.value_bits)
    assert all(ours < hurt(other.key_bits, other.value_bits) for other in SPACE.uniform())


def test_the_search_evaluates_a_start_as_it_is():
    starts = warm.starts([measured(0), measured(1)], SPACE)
    assert len(starts) == 2
    for start in starts:
        again = SPACE.candidate(SPACE.encode(start))
        assert [array.tolist() for array in again] == [array.tolist() for array in start]


def test_what_hurts_most_is_kept_widest():
    found = measured()
    found.keys[2] *= 1e4
    found.values[1] *= 1e4
    (start,) = warm.starts([found], SPACE)
    assert start.key_bits.argmax() == 2
    assert start.value_bits.argmax() == 1


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")  # set, though empty: the command leaves the setting alone


@pytest.fixture(scope="module")
def file(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sensitivity")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", "")
        words = ["--model", str(checkpoint), "--samples", "4", "--group", "8", "--batch", "4", "--out", str(out)]
        assert sensitivity.main(words) == 0
    return out / sensitivity.FILE


def arguments(checkpoint: Path, file: Path, out: Path, *more: str) -> list[str]:
    sizes = "--kv-budget 0.55 --group 8 --batch 4 --calibration-samples 4 --search-samples 6 --report-samples 6".split()
    named = ["--model", str(checkpoint), "--sensitivity", str(file), "--out", str(out)]
    return ["--budget", "0.5", *named, *sizes, "--trials", "6", *more]


def test_the_first_trials_of_a_search_are_the_uniform_and_then_these(checkpoint: Path, file: Path, tmp_path: Path):
    words = arguments(checkpoint, file, tmp_path / "out")
    assert tpe.main(words) == 0
    settings = session.read_settings(tpe.parser().parse_args(words))[1]
    model = checkpoints.load(checkpoint)
    space = settings.space(model.config)
    starts = warm.starts(warm.load(file, settings, model.params, model.config.text.layers), space)
    assert starts
    trials = optuna.load_study(
        study_name="lmmjax", storage=open_storage(str(tmp_path / "out" / "study.journal"))
    ).trials
    first = len(space.uniform())
    for trial, start in zip(trials[first : first + len(starts)], starts, strict=True):
        assert trial.user_attrs["key_bits"] == start.key_bits.tolist()
        assert trial.user_attrs["value_bits"] == start.value_bits.tolist()
        assert trial.user_attrs["drops"] == start.drops.tolist()
    history = json.loads((tmp_path / "out" / "report.json").read_text())["history"]
    assert [trial["uniform"] for trial in history] == [i < first for i in range(len(trials))]


def test_a_search_is_not_resumed_with_other_starts(
    checkpoint: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    copy, out = tmp_path / "sensitivity.json", tmp_path / "out"
    raw = json.loads(file.read_text())
    copy.write_text(json.dumps(raw))
    assert tpe.main(arguments(checkpoint, copy, out, "--trials", "1")) == 0
    raw["loss_change"]["keys"][0] = [1e3] * len(WIDTHS)
    raw["loss_change"]["values"][1] = [1e-9] * len(WIDTHS)
    copy.write_text(json.dumps(raw))
    assert tpe.main(arguments(checkpoint, copy, out, "--trials", "2")) == 2
    assert "this search was begun with starts " in capsys.readouterr().err


def change(*keys: str, to: Any) -> Callable[[dict], None]:
    def apply(raw: dict) -> None:
        for key in keys[:-1]:
            raw = raw[key]
        raw[keys[-1]] = to

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change("settings", "weights", to="0" * 16), "measured on another model (model)"),
        (change("settings", "cache", "group", to=32), "measured with group 32, the search's cache has 8"),
        (change("settings", "cache", "keys", to="before_rope"), "measured with keys 'before_rope'"),
        (change("settings", "seed", to=1), "seed 1, which may be among those searched on"),
        (change("settings", "samples", to=5), "5 samples of easy-vqa"),
        (change("settings", "data", to="/elsewhere.jsonl"), "4 samples of /elsewhere.jsonl"),
        (change("settings", to={}), "is not of lmmjax.sensitivity's making"),
        (change("loss_change", to={"keys": []}), "is not of lmmjax.sensitivity's making"),
        (change("loss_change", "keys", to=[[1.0] * len(WIDTHS)] * 3), "has not 2 layers"),
        (change("bits", to=[8, 4, 2]), "has not 2 layers at each of"),
        (change("attention_error", "keys", to=[[0.0] * len(WIDTHS)] * 2), "nothing was rounded in"),
    ],
)
def test_a_file_of_something_else_is_refused_in_one_line(
    checkpoint: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage, message: str
):
    raw = json.loads(file.read_text())
    damage(raw)
    (tmp_path / "damaged.json").write_text(json.dumps(raw))
    assert tpe.main(arguments(checkpoint, tmp_path / "damaged.json", tmp_path / "out")) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: --sensitivity: ")
    assert message in last
    assert not (tmp_path / "out" / "study.journal").exists()


def test_a_file_that_is_not_there_is_refused(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert tpe.main(arguments(checkpoint, tmp_path / "nothing.json", tmp_path / "out")) == 2
    assert "nothing.json: cannot be read" in capsys.readouterr().err


def test_the_window_and_fewer_samples_are_no_reason_to_refuse(checkpoint: Path, file: Path):
    model = checkpoints.load(checkpoint)
    text = model.config.text
    settings = Settings("model", 0.5, 0.55, 128, form=CacheFormat(8, window=16), calibration_samples=64)
    found = warm.load(file, settings, model.params, text.layers)
    assert len(found) == len(warm.MEASURES)
    raw = json.loads(file.read_text())
    np.testing.assert_allclose(found[0].keys, raw["loss_change"]["keys"])
    np.testing.assert_allclose(found[1].values, np.square(raw["attention_error"]["values"]))
    with pytest.raises(InputError, match="seed 0, which may be among"):
        warm.load(file, dataclasses.replace(settings, calibration_samples=3), model.params, text.layers)
