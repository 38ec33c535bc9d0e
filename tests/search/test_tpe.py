"""The search as a command: from a dense checkpoint to a plan, a compressed checkpoint and a report."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from lmmjax import checkpoint as checkpoints
from lmmjax import prune
from lmmjax.checkpoint import load
from lmmjax.config import LINEARS
from lmmjax.plan import Plan
from search import output, problem, tpe
from search.cache_budget import CacheBudget

ROOT = Path(__file__).parents[2]
SMALL = (
    "--trials 4 --kv-budget 0.6 --group 8 --batch 4 --calibration-samples 4 --search-samples 6 --report-samples 6"
).split()


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")  # set, though empty: the command leaves the setting alone


def arguments(checkpoint: Path, out: Path, *more: str) -> list[str]:
    return ["--budget", "0.5", "--model", str(checkpoint), "--out", str(out), *SMALL, *more]


@pytest.fixture(scope="module")
def searched(checkpoint, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("search") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", "")
        assert tpe.main(arguments(checkpoint, out)) == 0
    return out


def test_the_plan_lies_on_both_budgets(searched, checkpoint):
    text = load(checkpoint).config.text
    plan = Plan.load(searched / "plan.json").check(text)
    assert plan.sparsity(text) == pytest.approx(0.5, abs=8 / sum(np.prod(text.linear_shape(name)) for name in LINEARS))
    budget = CacheBudget(text, 0.6, text.context, plan.cache)
    bits = [np.array([getattr(layer, side) for layer in plan.layers]) for side in ("key_bits", "value_bits")]
    assert budget.share(*bits) <= 0.6
    assert (plan.cache.group, plan.score, plan.calibration.samples) == (8, "lognorm", 4)


def test_the_checkpoint_holds_the_zeros_and_the_plan(searched, checkpoint):
    dense, compressed = load(checkpoint), load(searched / "checkpoint")
    plan = Plan.load(searched / "plan.json")
    assert compressed.plan == plan
    for index, layer in enumerate(plan.layers):
        for name, count in layer.drop.items():
            part = "attn" if name in "qkvo" else "mlp"
            kernel = np.asarray(compressed.params["text"][f"layers_{index}"][part][name]["kernel"])
            before = np.asarray(dense.params["text"][f"layers_{index}"][part][name]["kernel"])
            assert ((kernel == 0).sum(0) == count).all()
            np.testing.assert_array_equal(kernel, np.where(kernel == 0, 0, before))
    np.testing.assert_array_equal(
        compressed.params["projector"]["linear_1"]["kernel"], dense.params["projector"]["linear_1"]["kernel"]
    )


def test_the_plan_can_be_replayed_on_the_dense_model(searched, checkpoint):
    replayed = prune.replay(load(checkpoint), Plan.load(searched / "plan.json"))
    compressed = load(searched / "checkpoint").params
    for index in range(2):
        kernel = f"layers_{index}"
        np.testing.assert_array_equal(
            replayed["text"][kernel]["mlp"]["down"]["kernel"], compressed["text"][kernel]["mlp"]["down"]["kernel"]
        )


def test_the_report_compares_at_equal_budgets_on_sets_that_share_no_image(searched):
    found = json.loads((searched / "report.json").read_text())
    assert found["trials"] == len(found["history"]) == 4
    rows = {row["name"]: row for row in found["rows"]}
    kept = {row["weights_kept"] for name, row in rows.items() if name != "dense"}
    assert len(rows) == 6
    assert max(kept) - min(kept) < 1e-3
    assert rows["dense"]["kl"] == 0
    assert all(row["kv_share"] <= 0.6 for name, row in rows.items() if "dense" not in name)
    assert found["sets"]["report"] == "6 questions on 6 images of easy-vqa, test"
    assert found["try"].startswith(f"python -m lmmjax.generate --model {searched}/checkpoint --image ")
    assert min(trial["value"] for trial in found["history"]) == pytest.approx(best_value(searched))


def best_value(out: Path) -> float:
    lines = (json.loads(line) for line in (out / "study.journal").read_text().splitlines())
    return min(line["value"] for line in lines if "value" in line)


def test_a_finished_search_is_shown_again_and_not_run_again(searched, checkpoint, capsys):
    before = (searched / "study.journal").read_bytes()
    assert tpe.main(arguments(checkpoint, searched)) == 0
    shown = capsys.readouterr().out
    assert "finished; give more --trials" in shown
    assert "searched - uniform wanda" in shown
    assert f"report: {searched}/report.html" in shown
    assert (searched / "study.journal").read_bytes() == before


def test_more_trials_go_on_from_those_there_are(searched, checkpoint, tmp_path, capsys):
    first = json.loads((searched / "report.json").read_text())["history"]
    more = ["--trials", "5"]
    assert tpe.main(arguments(checkpoint, searched, *more)) == 0
    found = json.loads((searched / "report.json").read_text())
    assert [trial["value"] for trial in found["history"][:4]] == [trial["value"] for trial in first]
    assert found["trials"] == 5
    assert not (searched / ".checkpoint-old").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--budget", "0"], "--budget: got 0"),
        (["--budget", "1.2"], "--budget: got 1.2"),
        (["--kv-budget", "0.05"], "the cache can take"),
        (["--box", "-1"], "--box: got -1"),
        (["--blocks", "3"], "--blocks: got '3'"),
        (["--context", "4096"], "--context: got 4096, expected at most the model's 128"),
        (["--group", "0"], "got group 0, window 0"),
        (["--window", "3"], "got group 32, window 3"),
        (["--trials", "0"], "--trials: got 0"),
        (["--search-samples", "0"], "--search-samples: got 0"),
        (["--seed", "-1"], "--seed: got -1"),
        (["--budget", "1", "--kv-budget", "1"], "nothing is left to choose"),
        (["--model", "nowhere"], "there is no directory nowhere"),
        (["--data", "nothing.jsonl"], "nothing.jsonl"),
        (["--report-samples", "999999"], "999999"),
        (["--out", "/proc/nowhere"], "--out: cannot write"),
    ],
)
def test_bad_input_ends_with_one_line_and_code_2(checkpoint, tmp_path, capsys, more, message):
    assert tpe.main(arguments(checkpoint, tmp_path / "out", *more)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ")
    assert message in lines[-1]
    assert not (tmp_path / "out" / "plan.json").exists()


def test_other_settings_in_the_same_directory_are_refused(searched, checkpoint, capsys):
    assert tpe.main(arguments(checkpoint, searched, "--box", "0.1")) == 2
    assert "begun with box 0.15 (now 0.1)" in capsys.readouterr().err


def test_a_compressed_checkpoint_is_no_start(searched, tmp_path, capsys):
    assert tpe.main(arguments(searched / "checkpoint", tmp_path / "out")) == 2
    assert "is compressed already" in capsys.readouterr().err


def test_an_out_in_use_is_refused(searched, checkpoint, capsys):
    with output.only_one(searched):
        assert tpe.main(arguments(checkpoint, searched)) == 2
    assert "another search is writing" in capsys.readouterr().err


def test_ctrl_c_writes_the_best_so_far(checkpoint, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "search.tpe", *arguments(checkpoint, out, "--trials", "100000")]
    environment = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "LMMJAX_CACHE": str(tmp_path / "cache")}
    environment.pop("JAX_COMPILATION_CACHE_DIR")
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    journal = out / "study.journal"
    while process.poll() is None and not (journal.exists() and b'"value"' in journal.read_bytes()):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err.decode()
    assert b"stopping after this trial" in err
    found = json.loads((out / "report.json").read_text())
    assert 0 < found["trials"] < 100000
    assert load(out / "checkpoint").plan == Plan.load(out / "plan.json")
    assert found["command"] == shlex.join(["python", *command[1:]])


def test_a_jsonl_file_gives_three_sets_without_a_common_image(checkpoint, tmp_path):
    import easy_vqa

    paths = easy_vqa.get_test_image_paths()
    lines = [{"image": paths[i], "question": f"is it {i}?", "answer": "yes"} for i in range(12)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    sets = problem.sets.take(str(tmp_path / "data.jsonl"), 4, 4, 4, seed=0)
    images = [{sample.image for sample in part} for part in (sets.calibration, sets.search, sets.report)]
    assert len(set.union(*images)) == 12


def test_the_default_directory_is_named_after_model_and_budget():
    from search.settings import default_out

    assert default_out(None, 0.5) == Path("runs/tiny-0.5")
    assert default_out("models/llava-7b/", 0.6) == Path("runs/llava-7b-0.6")
    assert checkpoints.EMBEDDED.name == "tiny"
