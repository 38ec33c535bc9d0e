"""The search as a command: from a dense checkpoint to a plan, a compressed checkpoint and a report."""

import html
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import easy_vqa
import numpy as np
import pytest

from lmmjax import checkpoint as checkpoints
from lmmjax import generate
from lmmjax.cache import cache_bytes
from lmmjax.checkpoint import load
from lmmjax.config import LINEARS, TextConfig
from lmmjax.data import Sample
from lmmjax.plan import CacheFormat, Plan
from lmmjax.prune.replay import replay
from lmmjax.prune.scores import SCORES
from search import objective, output, problem, report, session, settings, storage, tpe
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
    replayed = replay(load(checkpoint), Plan.load(searched / "plan.json"))
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
    assert list(rows) == [
        "dense",
        "uniform magnitude",
        "uniform wanda",
        "uniform wanda, slack filled",
        "uniform wanda, dense cache",
        "uniform lognorm",
        "searched",
    ]
    assert rows["uniform wanda"]["kv_bytes"] <= rows["uniform wanda, slack filled"]["kv_bytes"]
    assert max(kept) - min(kept) < 1e-3
    assert rows["dense"]["kl"] == 0
    assert all(row["kv_share"] <= 0.6 for name, row in rows.items() if "dense" not in name)
    assert found["sets"]["report"] == "6 questions on 6 images of easy-vqa, test"
    assert f" -m lmmjax.generate --model {searched}/checkpoint --image " in found["try"]
    assert os.path.abspath(shlex.split(found["try"])[0]) == sys.executable
    assert html.escape(found["try"]) in (searched / "report.html").read_text()
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


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("checkpoint/lmmjax.json", None),
        ("plan.json", None),
        ("report.html", None),
        ("report.json", None),
        ("report.json", "{}"),
        ("report.json", "{"),
    ],
)
def test_a_search_is_finished_only_if_all_its_results_are_there(searched, name, content):
    path = searched / name
    before = path.read_text()
    asked = json.loads((searched / "report.json").read_text())["settings"]
    assert output.is_finished(searched, asked, 4)
    path.unlink() if content is None else path.write_text(content)
    finished = output.is_finished(searched, asked, 4)
    path.write_text(before)
    assert not finished


def test_a_search_is_finished_only_for_what_was_asked(searched):
    asked = json.loads((searched / "report.json").read_text())["settings"]
    assert not output.is_finished(searched, asked, 5)
    assert not output.is_finished(searched, asked | {"report_samples": 7}, 4)
    assert not output.is_finished(searched, asked | {"storage": "/elsewhere/study.journal"}, 4)


def test_the_model_is_written_before_the_comparison_and_no_old_report_stands_beside_it(
    searched, checkpoint, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    shutil.copytree(searched, out)
    shutil.rmtree(out / "checkpoint")
    (out / "plan.json").unlink()

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(problem.Problem, "compared", interrupted)
    assert tpe.main(arguments(checkpoint, out)) == 130
    assert load(out / "checkpoint").plan == Plan.load(out / "plan.json") == Plan.load(searched / "plan.json")
    assert not (out / "report.json").exists()
    assert not (out / "report.html").exists()


def test_perplexity_is_shown_of_the_tokens_that_were_searched_on(checkpoint, tmp_path, capsys):
    assert tpe.main(arguments(checkpoint, tmp_path / "out", "--objective", "ppl", "--trials", "1")) == 0
    rows = json.loads((tmp_path / "out" / "report.json").read_text())["rows"]
    assert all(row["ppl"] == pytest.approx(math.exp(row["nll"])) for row in rows)
    shown = capsys.readouterr().out
    assert f"{rows[-1]['ppl']:.4f}" in shown
    assert " ppl " in shown.splitlines()[2]


def test_a_plan_that_breaks_the_model_is_the_worst_trial_and_not_the_end(checkpoint, tmp_path, monkeypatch):
    true = problem.OBJECTIVES["kl"]
    calls = iter(range(1000))
    monkeypatch.setitem(problem.OBJECTIVES, "kl", lambda result: true(result) if next(calls) % 2 else math.nan)
    out = tmp_path / "out"
    assert tpe.main(arguments(checkpoint, out)) == 0
    history = json.loads((out / "report.json").read_text(), parse_constant=pytest.fail)["history"]
    values = [trial["value"] for trial in history]
    assert values[0] is values[2] is None
    assert values[1] is not None
    assert values[3] is not None


def read(checkpoint: Path | None, *more: str):
    chosen = ["--model", str(checkpoint)] if checkpoint else []
    return session.read_settings(tpe.parser().parse_args(["--budget", "0.5", *chosen, *more]))[1]


def test_a_relative_data_file_is_remembered_by_its_whole_path(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read(checkpoint, "--data", "data.jsonl", "--group", "8").data == str(tmp_path / "data.jsonl")
    assert read(checkpoint, "--group", "8").data == "easy-vqa"


def test_the_embedded_model_goes_by_its_name(checkpoint, monkeypatch):
    monkeypatch.setattr(checkpoints, "resolve", lambda model: checkpoint)  # as if it were converted already
    settings = read(None, "--group", "8")
    assert report._title({"settings": settings.record}) == "tiny at budget 0.5"


def test_the_interpreter_is_named_as_it_can_be_pasted(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv" / "bin" / "python"))
    assert session._python("lmmjax.generate", "--prompt", "a b") == ".venv/bin/python -m lmmjax.generate --prompt 'a b'"
    monkeypatch.setattr(sys, "executable", "/usr/bin/python3")
    assert session._python("lmmjax.generate") == "/usr/bin/python3 -m lmmjax.generate"


def test_the_fingerprint_sees_a_change_anywhere_in_a_tensor(checkpoint):
    sample = Sample(Path("a.png"), "what?", "red", "colour")

    def fingerprint(kernel: np.ndarray) -> str:
        model = SimpleNamespace(params={"kernel": kernel})
        sets = SimpleNamespace(calibration=[sample], search=[sample])
        return problem.fingerprint(SimpleNamespace(checkpoint=model, sets=sets))  # pyright: ignore[reportArgumentType]

    kernel = np.arange(64 * 96, dtype=np.float32).reshape(64, 96)
    changed = kernel.copy()
    changed[40:] += 1
    column = kernel.copy()
    column[:, 5] = 0
    assert len({fingerprint(each) for each in (kernel, changed, column, kernel.reshape(96, 64))}) == 4
    assert fingerprint(kernel) == fingerprint(kernel.copy())


def test_what_is_left_open_follows_the_size_of_the_model_and_is_said(checkpoint, monkeypatch, capsys):
    chosen = tpe.parser().parse_args(
        ["--budget", "0.5", "--model", str(checkpoint), "--group", "8", "--search-samples", "7"]
    )
    args, small = session.read_settings(chosen)
    assert (args.trials, small.calibration_samples, small.search_samples, args.report_samples) == (100, 128, 7, 1000)
    assert "--trials 100, --calibration-samples 128, --report-samples 1000" in capsys.readouterr().err
    monkeypatch.setattr(TextConfig, "prunable", 106_000_000)
    args, large = session.read_settings(chosen)
    effort = settings.effort(106_000_000)
    assert (args.trials, large.calibration_samples, args.report_samples) == (effort.trials, *effort[1::2])
    assert large.search_samples == 7


def test_the_help_states_the_rule(capsys):
    with pytest.raises(SystemExit):
        tpe.main(["--help"])
    shown = capsys.readouterr().out
    for effort in settings.EFFORTS.values():
        assert re.search(r"\s+".join(map(str, effort)), shown)


def test_help_and_mistyped_flags_import_nothing_heavy():
    code = (
        "import sys, search.tpe as s\ntry: s.main(sys.argv[1:])\n"
        "except SystemExit as e: print(e.code, sorted({'jax', 'kernels', 'optuna', 'transformers'} & set(sys.modules)))"
    )
    for flag, expected in (("--help", "0 []"), ("--nonsense", "2 []")):
        done = subprocess.run([sys.executable, "-c", code, flag], cwd=ROOT, capture_output=True, text=True)
        assert done.stdout.splitlines()[-1] == expected


def test_choices_are_what_there_is():
    assert tuple(objective.OBJECTIVES) == settings.OBJECTIVES
    assert set(settings.SCORES) == {name for name, score in SCORES.items() if not score.gradients}


def test_a_foreign_package_named_kernels_is_said_in_one_line(tmp_path):
    info, package = tmp_path / "kernels-0.9.0.dist-info", tmp_path / "kernels"
    info.mkdir()
    package.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.9.0\n")
    (package / "__init__.py").write_text("")
    done = subprocess.run(
        [sys.executable, "-m", "search.tpe", "--budget", "0.5"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "'kernels' 0.9.0" in done.stderr


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
        (["--window", "3"], "got group 8, window 3"),
        (["--sinks", "-1"], "got sinks -1"),
        (["--rotate-keys", "--keys", "before_rope"], "choose one of them"),
        (["--rotate-values", "folded"], "--rotate-values: folded fills pruned weights of v and o again; use online"),
        (["--visual-values", "tokens", "--context", "4"], "--context: got 4, expected more than a picture's 4 tokens"),
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


FORMAT = "--keys before_rope --rotate-values online --clip --metadata float8 --sinks 1".split()


@pytest.fixture(scope="module")
def formatted(checkpoint, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("formatted") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", "")
        assert tpe.main(arguments(checkpoint, out, *FORMAT, "--trials", "2")) == 0
    return out


def answer(capsys, model: Path, *more: str) -> str:
    picture = next(iter(easy_vqa.get_test_image_paths().values()))
    words = ["--model", str(model), "--image", picture, "--prompt", "what?", "--max-tokens", "8", "--json"]
    assert generate.main([*words, *more]) == 0
    return json.loads(capsys.readouterr().out)["text"]


def test_the_plan_has_the_format_that_was_searched_under(formatted, checkpoint):
    text = load(checkpoint).config.text
    plan = Plan.load(formatted / "plan.json").check(text)
    assert plan.cache == CacheFormat(
        8, keys="before_rope", rotate_values="online", clip=True, metadata="float8", sinks=1
    )
    found = json.loads((formatted / "report.json").read_text())
    rows = {row["name"]: row for row in found["rows"]}
    assert rows["searched"]["kv_bytes"] == cache_bytes(text, plan, 1, text.context)
    assert rows["searched"]["kv_bytes"] <= 0.6 * rows["dense"]["kv_bytes"]
    assert rows["dense"]["kl"] == 0
    assert {name: found["settings"][name] for name in vars(plan.cache)} == vars(plan.cache)
    words = "keys in groups of 8 tokens, before RoPE; values in groups of 8 channels, rotated as they come; spans and"
    assert f"{words} zeros in float8, each group&#x27;s range narrowed" in (formatted / "report.html").read_text()


def test_a_plan_of_another_format_replays(formatted, checkpoint, capsys):
    replayed = answer(capsys, checkpoint, "--plan", str(formatted / "plan.json"))
    assert answer(capsys, formatted / "checkpoint") == replayed


def test_another_format_in_the_same_directory_is_refused(formatted, checkpoint, capsys):
    assert tpe.main(arguments(checkpoint, formatted, *FORMAT[:4], *FORMAT[5:], "--sinks", "2")) == 2
    assert "begun with clip True (now False), sinks 1 (now 2): give" in capsys.readouterr().err.splitlines()[-1]


def test_values_whose_rotation_is_folded_into_the_weights_are_searched_where_none_is_pruned(
    checkpoint, tmp_path, capsys
):
    out, more = tmp_path / "out", ["--budget", "1", "--rotate-values", "folded", "--trials", "1"]
    assert tpe.main(arguments(checkpoint, out, *more)) == 0
    capsys.readouterr()
    replayed = answer(capsys, checkpoint, "--plan", str(out / "plan.json"))
    assert answer(capsys, out / "checkpoint") == replayed
    before, after = (
        load(path).params["text"]["layers_0"]["attn"]["v"]["kernel"] for path in (checkpoint, out / "checkpoint")
    )
    assert np.abs(np.asarray(before) - np.asarray(after)).max() > 1e-3


def test_a_compressed_checkpoint_is_no_start(searched, tmp_path, capsys):
    assert tpe.main(arguments(searched / "checkpoint", tmp_path / "out")) == 2
    assert "is compressed already" in capsys.readouterr().err


def test_an_out_in_use_is_refused(searched, checkpoint, capsys):
    with output.only_one(searched):
        assert tpe.main(arguments(checkpoint, searched)) == 2
    assert "another process is writing" in capsys.readouterr().err


def test_a_journal_in_use_by_a_search_with_another_out_is_refused(checkpoint, tmp_path, capsys):
    journal = tmp_path / "shared.journal"
    with storage.only_one(str(journal)):
        assert tpe.main(arguments(checkpoint, tmp_path / "out", "--storage", str(journal))) == 2
    assert f"--storage: another process is writing to {journal}" in capsys.readouterr().err
    assert not journal.exists()


def test_ctrl_c_writes_the_best_so_far(checkpoint, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "search.tpe", *arguments(checkpoint, out, "--trials", "100000")]
    environment = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "LMMJAX_CACHE": str(tmp_path / "cache")}
    environment.pop("JAX_COMPILATION_CACHE_DIR")
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    journal = out / "study.journal"
    latest = time.monotonic() + 120
    try:
        while process.poll() is None and not (journal.exists() and b'"value"' in journal.read_bytes()):
            assert time.monotonic() < latest, "no trial in two minutes"
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, err.decode()
    assert b"stopping after this trial" in err
    found = json.loads((out / "report.json").read_text())
    assert 0 < found["trials"] < 100000
    assert load(out / "checkpoint").plan == Plan.load(out / "plan.json")
    python, *rest = shlex.split(found["command"])
    assert [os.path.abspath(ROOT / python), *rest] == command  # relative where the interpreter lies below the cwd


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
