"""The record of trials: what survives a kill, what a resumed search does, and how Ctrl-C ends one."""

import json
import math
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import optuna
import pytest
from optuna.distributions import FloatDistribution

from lmmjax.errors import InputError
from search import study
from search.storage import open_storage, without_password

ROOT = Path(__file__).parents[2]
SPACE = {name: FloatDistribution(0, 1) for name in "abc"}
STARTS = [dict.fromkeys(SPACE, 0.5)]
SETTINGS = {"budget": 0.5, "seed": 0}

SCRIPT = """
    import sys, time
    from optuna.distributions import FloatDistribution
    from search import study
    from search.storage import open_storage

    def evaluate(point):
        time.sleep(0.03)
        return study.Outcome(sum((value - 0.3) ** 2 for value in point.values()), point, {})

    space = {name: FloatDistribution(0, 1) for name in "abc"}
    record = study.Record(open_storage(sys.argv[1]), {"budget": 0.5, "seed": 0})
    starts = [dict.fromkeys(space, 0.5)]
    print("ready", flush=True)
    with study.stop_on_interrupt() as stopped:
        for trial in study.run(record, space, evaluate, trials=30, starts=starts, propose=study.tpe, seed=0):
            print(trial.number, flush=True)
            if stopped():
                break
    print("ended", flush=True)
"""


def evaluate(point: study.Params) -> study.Outcome:
    return study.Outcome(sum((value - 0.3) ** 2 for value in point.values()), point, {})


def record(path: Path, settings=SETTINGS) -> study.Record:
    return study.Record(open_storage(str(path)), settings)


def search(into: study.Record, trials: int = 30, propose=study.tpe, seed: int = 0) -> list[optuna.trial.FrozenTrial]:
    list(study.run(into, SPACE, evaluate, trials=trials, starts=STARTS, propose=propose, seed=seed))
    return into.trials


def points(trials) -> list[dict[str, float]]:
    return [trial.params for trial in trials]


def start(path: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> list[dict[str, float]]:
    return points(search(record(tmp_path_factory.mktemp("whole") / "study.journal")))


def test_a_search_begins_with_its_starts_and_beats_them(tmp_path):
    trials = search(record(tmp_path / "study.journal"))
    assert trials[0].params == STARTS[0]
    assert len(trials) == 30
    assert min(study.value(trial) for trial in trials) < study.value(trials[0]) / 4


def test_tpe_beats_random_search_on_a_bowl():
    def best(propose) -> float:
        runs = [search(study.Record(optuna.storages.InMemoryStorage(), {}), 40, propose, seed) for seed in range(3)]
        return sum(min(study.value(trial) for trial in run) for run in runs)

    assert best(study.tpe) < best(study.random)


def test_a_search_goes_where_the_seed_says(tmp_path, undisturbed):
    assert points(search(record(tmp_path / "a.journal"))) == undisturbed
    assert points(search(record(tmp_path / "b.journal"), seed=1)) != undisturbed


@pytest.mark.parametrize("seed", range(3))
def test_a_search_killed_at_any_moment_goes_on_as_if_nothing_had_happened(tmp_path, undisturbed, seed):
    path, moments = tmp_path / "study.journal", random.Random(seed)
    for _ in range(2):
        process = start(path)
        time.sleep(moments.uniform(0, 0.4))
        process.kill()
        process.communicate()
    assert len(record(path).trials) < 30
    assert points(search(record(path))) == undisturbed


def test_more_trials_can_be_asked_for_later(tmp_path, undisturbed):
    path = tmp_path / "study.journal"
    assert points(search(record(path), 12)) == undisturbed[:12]
    assert points(search(record(path), 30)) == undisturbed
    assert points(search(record(path), 5)) == undisturbed


def test_a_torn_last_line_is_cut_off(tmp_path, undisturbed):
    path = tmp_path / "study.journal"
    search(record(path), 8)
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    assert len(record(path).trials) == 7
    assert points(search(record(path))) == undisturbed


def test_a_lock_left_by_a_killed_process_does_not_hold_the_next(tmp_path):
    path = tmp_path / "study.journal"
    imports = "import sys, time; from pathlib import Path; from search.storage import FileLock"
    code = f"{imports}; FileLock(Path(sys.argv[1])).acquire(); print('held', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    process.kill()
    process.communicate()
    began = time.monotonic()
    search(record(path), 2)
    assert time.monotonic() - began < 10


def test_other_settings_are_refused_and_named(tmp_path):
    path = tmp_path / "study.journal"
    search(record(path), 2)
    with pytest.raises(InputError, match=r"begun with budget 0\.5 \(now 0\.6\), no record of box: give"):
        record(path, {"budget": 0.6, "seed": 0, "box": 0.1, "sensitivity": None})


def test_ctrl_c_ends_after_the_running_trial(tmp_path):
    process = start(tmp_path / "study.journal")
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0
    assert out.endswith("ended\n")
    assert "press Ctrl-C again" in err
    trials = record(tmp_path / "study.journal").trials
    assert 0 < len(trials) < 30
    assert len(trials) == len(out.splitlines())  # the first line was read, "ended" is the last


def test_a_second_ctrl_c_quits_at_once():
    before = signal.getsignal(signal.SIGINT)  # ignored, where a shell started the tests in the background
    with study.stop_on_interrupt() as stopped:
        signal.raise_signal(signal.SIGINT)
        assert stopped()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_database_keeps_the_record_too(tmp_path, undisturbed):
    url = f"sqlite:///{tmp_path}/study.db"
    assert points(search(study.Record(open_storage(url), SETTINGS), 6)) == undisturbed[:6]
    assert points(search(study.Record(open_storage(url), SETTINGS), 9)) == undisturbed[:9]


def test_a_storage_that_cannot_be_opened_is_bad_input(tmp_path):
    with pytest.raises(InputError, match="--storage"):
        open_storage("nosuch://database")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--storage"):
        open_storage(str(tmp_path / "file" / "study.journal"))
    (tmp_path / "junk.journal").write_text("not a journal")
    with pytest.raises(InputError, match="--storage"):
        record(tmp_path / "junk.journal")
    assert (tmp_path / "junk.journal").read_text() == "not a journal"


def test_a_search_goes_on_after_an_infinite_value(tmp_path):
    def broken_at_first(point):
        return study.Outcome(math.inf if point == STARTS[0] else evaluate(point).value, point, {})

    into = record(tmp_path / "study.journal")
    list(study.run(into, SPACE, broken_at_first, trials=14, starts=STARTS, propose=study.tpe, seed=0))
    values = [study.value(trial) for trial in record(tmp_path / "study.journal").trials]
    assert values[0] == math.inf
    assert all(map(math.isfinite, values[1:]))


@pytest.mark.parametrize(
    ("where", "shown"),
    [
        ("postgresql://me:secret@host:5432/db", "postgresql://me@host:5432/db"),
        ("sqlite:////data/study.db", "sqlite:////data/study.db"),
    ],
)
def test_a_password_is_not_shown(where, shown):
    assert without_password(f"--storage {where} --seed 1") == f"--storage {shown} --seed 1"


def test_facts_are_recorded_with_the_trial(tmp_path):
    into = record(tmp_path / "study.journal")

    def with_facts(point):
        return study.Outcome(1.0, point, {"accuracy": 0.5})

    list(study.run(into, SPACE, with_facts, trials=1, starts=STARTS, propose=study.tpe, seed=0))
    assert into.trials[0].user_attrs["accuracy"] == 0.5
    assert into.trials[0].user_attrs["seconds"] >= 0
    assert json.loads((tmp_path / "study.journal").read_text().splitlines()[-1])
