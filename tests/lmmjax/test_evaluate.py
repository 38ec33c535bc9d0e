"""The command: what it writes, that it goes on where it stopped, and what it refuses."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lmmjax import answer, contender
from lmmjax import checkpoint as checkpoints
from lmmjax.evaluate import main
from lmmjax.journal import Journal
from lmmjax.plan import CacheFormat, uniform

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def keep_the_process_as_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """What the command sets in the environment ends with the test, and it finds no network."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "xla"))
    for name in ("XLA_PYTHON_CLIENT_PREALLOCATE", "TRANSFORMERS_NO_ADVISORY_WARNINGS"):
        monkeypatch.setenv(name, "1")
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "0")

    def refuse(*_):
        raise AssertionError("the evaluation looked for a network")

    monkeypatch.setattr("socket.socket.connect", refuse)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    """A folder with questions on three images, a text, and a plan that rounds the cache."""
    folder, rng = tmp_path_factory.mktemp("evaluate"), np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(rng.integers(0, 256, (28, 28, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    rows = [
        {
            "question_id": f"q{i}",
            "image": f"{i % 3}.png",
            "text": "what is it?"[: 7 + i % 2],
            "answer": "x",
            "category": "ab"[i % 2],
        }
        for i in range(7)
    ]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 6)
    text = checkpoints.load(checkpoint).config.text
    plan = uniform(text, bits=2, cache=CacheFormat(group=8, dtype="float32"))
    (folder / "plan.json").write_text(plan.to_json())
    return folder


@pytest.fixture
def command(place: Path, checkpoint: Path) -> Callable[..., list[str]]:
    def words(out: Path, *more: str) -> list[str]:
        task = ("--task", str(place / "questions.jsonl"), "--scorer", "exact", "--batch", "2", "--max-tokens", "4")
        text = ("--text", str(place / "text.txt"), "--context", "32", "--stride", "16")
        plan = ("--plan", str(place / "plan.json"), "--baseline")
        return ["--model", str(checkpoint), *task, *text, *plan, "--out", str(out), *more]

    return words


def results(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("out") / "finished"


def test_answers_figures_and_table_are_written(
    command, finished: Path, checkpoint: Path, capsys: pytest.CaptureFixture
):
    assert main(command(finished)) == 0
    out, err = capsys.readouterr()
    for said in ("accuracy: a", "perplexity", "difference", "weights kept", "KV of", "tokens/s read"):
        assert said in out
    assert "model: answers" in err
    for name in ("answers.jsonl", "baseline.jsonl"):
        lines = [json.loads(line) for line in (finished / name).read_text().splitlines()]
        assert [line["question_id"] for line in lines] == [f"q{i}" for i in range(7)]
        assert set(lines[0]) == {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}
        assert len({line["answer_id"] for line in lines}) == 7
    found = results(finished)
    figures, models = found["figures"], found["models"]
    assert set(figures) == {"accuracy", "accuracy: a", "accuracy: b", "perplexity"}
    difference = figures["perplexity"]["difference"]
    assert difference["value"] == pytest.approx(
        figures["perplexity"]["model"]["value"] - figures["perplexity"]["baseline"]["value"]
    )
    assert difference["interval"][0] < difference["value"] < difference["interval"][1]
    assert models["model"]["kv_bytes"] < models["model"]["kv_dense_bytes"]
    assert models["model"]["weights_kept"] == 1
    assert models["model"]["read_tokens_per_second"] > 0
    assert found["about"]["command"].startswith("python -m lmmjax.evaluate --model")


def test_a_finished_evaluation_is_scored_again_without_a_model(command, finished: Path, monkeypatch):
    before = results(finished)
    monkeypatch.setattr(answer, "compress", None)
    assert main(command(finished)) == 0
    assert results(finished)["figures"] == before["figures"]


def test_an_interrupted_evaluation_goes_on_to_the_same_result(command, finished: Path, tmp_path: Path, monkeypatch):
    add, steps = Journal.add, []

    def interrupted(self: Journal, step, result):
        steps.append(step)
        if len(steps) in (2, 6):
            raise KeyboardInterrupt
        add(self, step, result)

    monkeypatch.setattr(Journal, "add", interrupted)
    assert main(command(tmp_path)) == 130
    assert main(command(tmp_path)) == 130
    assert not (tmp_path / "results.json").exists()
    assert main(command(tmp_path)) == 0
    computed = [step for step in steps if steps.count(step) == 1]
    assert len(steps) == len(set(steps)) + 2
    assert len(computed) == len(set(steps)) - 2
    for name in ("answers.jsonl", "baseline.jsonl"):
        assert (tmp_path / name).read_text() == (finished / name).read_text()
    assert results(tmp_path)["figures"] == results(finished)["figures"]


def test_other_settings_in_the_same_directory_are_refused(command, finished: Path, capsys: pytest.CaptureFixture):
    for more, says in ((("--max-tokens", "5"), "max_tokens 4"), (("--images", "none"), "images 'own'")):
        assert main(command(finished, *more)) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert f"holds results of {says}" in err


def test_controls_show_other_images_or_none(command, place: Path, tmp_path: Path, monkeypatch):
    shown = []
    monkeypatch.setattr(contender, "run", lambda one, processor, asked, journal: shown.append(asked.prompts) or 1 / 0)
    for images in ("own", "shuffled", "none"):
        with pytest.raises(ZeroDivisionError):
            main(command(tmp_path / images, "--images", images))
    own, shuffled, blind = shown
    assert all(one.image != two.image and one.ids == two.ids for one, two in zip(own, shuffled, strict=True))
    assert all(prompt.image is None and prompt.shared == 0 for prompt in blind)


BAD = {
    "--task, --text: got neither": ("--out", "x"),
    "--limit: got 0": ("--task", "easy-vqa", "--limit", "0", "--out", "x"),
    "--stride: got 0": ("--text", "f.txt", "--stride", "0", "--out", "x"),
    "--scorer: given without --task": ("--text", "f.txt", "--scorer", "exact", "--out", "x"),
    "easy-vqa and files": ("--task", "easy-vqa", "f.jsonl", "--out", "x"),
    "--annotations: given without --scorer": ("--task", "f.jsonl", "--annotations", "a", "--out", "x"),
    "f.jsonl: cannot be read": ("--task", "f.jsonl", "--out", "x"),
}


@pytest.mark.parametrize("says", BAD)
def test_bad_requests_end_in_one_line(says: str, capsys: pytest.CaptureFixture):
    assert main(BAD[says]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert says in err


def test_a_dense_model_has_no_baseline_of_its_own(place: Path, checkpoint: Path, tmp_path: Path, capsys):
    words = ["--model", str(checkpoint), "--text", str(place / "text.txt"), "--baseline", "--out", str(tmp_path)]
    assert main(words) == 2
    assert "the model is dense itself" in capsys.readouterr().err


def test_help_imports_nothing_heavy():
    code = (
        "import sys, lmmjax.evaluate as e\ntry: e.main(['--help'])\n"
        "except SystemExit as s: print(s.code, sorted({'jax', 'flax', 'transformers', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "0 []"
