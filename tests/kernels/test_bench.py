"""The attention benchmark: a small run from end to end, its file, and its arithmetic on numbers made by hand."""

import json
import types

import jax.numpy as jnp
import numpy as np
import pytest

from kernels import attend, bench
from kernels.race import caches, contest, entrants, jobs, noise, tables, timing
from kernels.race.caches import Scheme, Shape
from kernels.race.standings import Standings, fastest, figures, speedup
from kernels.race.timing import Entrant, Error

SMALL = ["--smoke", "--peers", "none", "--rows", "2x256", "--heads", "4/2", "--schemes", "g128-float8"]
SHAPE = "2x256 4/2"
FOUR, EXACT = f"{SHAPE} g128-float8 4 reference", f"{SHAPE} exact 16 reference"


def ours(path, *more, backends=("reference",)):
    return bench.main([*SMALL, "--backends", *backends, "--bits", "4", "16", "--out", str(path), *more])


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "attend.json"
    assert ours(path) == 0
    return path


def read(path):
    return json.loads(path.read_text())


def answer(job):
    """What `Contest.hold` gives, without measuring."""
    one = {"us": 10.0, "of_copy": 0.5, "error": 1e-3, "error_of_rounding": 1e-3}
    about = {"shape": job.shape.name, "cached": job.shape.cached, "way": job.way}
    if job.way == jobs.PEERS:
        return {**about, "entrants": {"jax-xla": one, "jax-cudnn": {"failed": "not here"}}}
    about |= {"bits": job.bits, "scheme": job.scheme.name if job.scheme else None}
    return {**about, "entrants": {job.way: one, "jax-xla": one}, "peer": "jax-xla", "speedup": 1.0}


@pytest.fixture
def quick(monkeypatch):
    """Jobs that take no time, and the names of those that were held."""
    held = []

    def hold(self, job):
        held.append(job.name)
        return answer(job)

    monkeypatch.setattr(contest.Contest, "hold", hold)
    monkeypatch.setattr(timing, "copy_bandwidth", lambda *_: 1e12)
    return held


def test_a_run_measures_ours_beside_the_best_peer_and_is_right(measured):
    data = read(measured)
    assert list(data["jobs"]) == [f"{SHAPE} peers", FOUR, EXACT]
    assert data["left_out"] == []
    assert data["runs"][0]["device"] == "cpu"
    assert data["runs"][0]["command"].startswith("python -m kernels.bench --smoke")
    peers = data["jobs"][f"{SHAPE} peers"]["entrants"]
    assert "cuDNN" in peers["jax-cudnn"]["failed"]
    for name in (FOUR, EXACT):
        job = data["jobs"][name]
        own, peer = job["entrants"]["reference"], job["entrants"]["jax-xla"]
        assert job["speedup"] == peer["us"] / own["us"]
        assert own["of_copy"] == pytest.approx(own["gbps"] / data["runs"][0]["copy_gbps"])
        assert own["error"] < 1.05 * own["error_of_rounding"] < 4e-3
        assert peer["error"] < 1e-2  # its weights are bfloat16, too


def test_the_bytes_are_those_that_must_be_read(measured):
    jobs = read(measured)["jobs"]
    values = 2 * 2 * 256 * 32
    codes, key_groups, value_groups = 2 * values // 2, values // 128, values // 32
    assert jobs[FOUR]["entrants"]["reference"]["bytes"] == codes + 2 * (key_groups + value_groups)
    assert jobs[EXACT]["entrants"]["reference"]["bytes"] == 2 * 2 * values


def test_dequantized_attention_is_the_attention_of_what_is_stored():
    shape = Shape(2, 128, 2, 2, 32)
    made = entrants.ours(entrants.DEQUANTIZE, shape, Scheme(32, "float16"), 3, working_set=1)
    assert made.error.whole < 1e-2  # what it reads it rounds to bfloat16
    assert made.wait(made.run()).shape == (2, 2, 1, 32)


def test_resuming_measures_only_what_is_missing(tmp_path, quick):
    path = tmp_path / "attend.json"
    assert ours(path) == 0
    assert quick == [f"{SHAPE} peers", FOUR, EXACT]
    assert ours(path, "--resume", backends=("reference", "dequantize")) == 0
    assert quick[3:] == [f"{SHAPE} g128-float8 4 dequantize"]
    assert len(read(path)["runs"]) == 2


@pytest.mark.parametrize("change", ["failed", "another peer is best"])
def test_resuming_repeats_what_failed_or_is_compared_with_another_peer(tmp_path, quick, change):
    path = tmp_path / "attend.json"
    ours(path)
    data = read(path)
    if change == "failed":
        data["jobs"][FOUR]["entrants"]["reference"] = {"failed": "out of memory"}
    else:
        data["jobs"][FOUR]["peer"] = "jax-cudnn"
    path.write_text(json.dumps(data))
    ours(path, "--resume")
    assert quick[3:] == [FOUR]


def test_a_stopped_run_keeps_its_results(tmp_path, quick, monkeypatch, capsys):
    path, hold = tmp_path / "attend.json", contest.Contest.hold

    def stopped(self, job):
        if len(quick) == 2:
            raise KeyboardInterrupt
        return hold(self, job)

    monkeypatch.setattr(contest.Contest, "hold", stopped)
    assert ours(path) == 130
    assert list(read(path)["jobs"]) == [f"{SHAPE} peers", FOUR]
    assert read(path)["left_out"] == [EXACT]
    assert [each.name for each in tmp_path.iterdir()] == ["attend.json"]
    assert "interrupted" in capsys.readouterr().err


def test_out_of_time_says_what_is_left_out(tmp_path, quick, capsys):
    path = tmp_path / "attend.json"
    assert ours(path, "--minutes", "0") == 0
    assert (quick, read(path)["left_out"]) == ([], [f"{SHAPE} peers", FOUR, EXACT])
    assert "out of time: 3 of 3 jobs are left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rows", "3x7"], "--rows: got 3x7, expected some of 2x256, 1x256"),
        (["--peers", "no.such.module"], "--peers: no.such.module does not load"),
        ([], "exists; go on with it by --resume"),
        (["--resume"], "was measured on NVIDIA Abacus, this is cpu"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, arguments, said):
    path = tmp_path / "attend.json"
    path.write_text(json.dumps({"runs": [{"device": "NVIDIA Abacus"}], "jobs": {}, "left_out": []}))
    assert bench.main(["--smoke", "--peers", "none", "--out", str(path), *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_file_of_something_else_is_left_alone(tmp_path, capsys):
    path = tmp_path / "attend.json"
    path.write_text("[1]")
    assert bench.main([*SMALL, "--out", str(path), "--resume"]) == 2
    assert "holds no results of this benchmark" in capsys.readouterr().err
    assert path.read_text() == "[1]"


def test_without_torch_it_is_said_and_jax_remains(monkeypatch, capsys):
    monkeypatch.setattr(bench, "TORCH", "no.such.torch")
    assert bench._peers(None) == [entrants]
    assert "without torch's attention" in capsys.readouterr().err


def test_who_cannot_run_fails_or_is_wrong_leaves_a_reason_and_no_time(monkeypatch, tmp_path):
    backends = {
        "picky": attend.Backend(lambda *_: pytest.fail("ran"), lambda *_: "needs a GPU"),
        "zero": attend.Backend(lambda call: jnp.zeros_like(call.q), lambda *_: None),
    }
    monkeypatch.setattr(attend, "BACKENDS", backends)
    shape = Shape(1, 128, 2, 2, 32)

    def broken(shape, working_set):
        raise RuntimeError("no kernel\nof many lines")

    def steady(shape, working_set):
        return Entrant(lambda: None, lambda _: None, 1, 100, Error(1e-3, 1e-3))

    module = types.SimpleNamespace(PEERS={"broken": broken, "steady": steady}, release=lambda: None)
    standings = Standings.open(tmp_path / "attend.json", False)
    standings.begin([], 1e9)
    held = contest.Contest(jobs.SMOKE, [module], standings)
    todo = [jobs.Job(shape), *(jobs.Job(shape, way, Scheme(32, "float16"), 4) for way in ("picky", "zero"))]
    contest.run(todo, held, standings, np.inf)
    peers, picky, zero = standings.jobs.values()
    assert peers["entrants"]["broken"] == {"failed": "no kernel"}
    assert picky["reason"] == "needs a GPU"
    assert "us" in zero["entrants"]["steady"]
    assert zero["entrants"]["zero"] == {"failed": "wrong result: relative error 1"}
    assert zero["speedup"] is None
    assert standings.measured() == []


def test_what_does_not_fit_is_left_out(monkeypatch, tmp_path):
    device = types.SimpleNamespace(memory_stats=lambda: {"bytes_limit": 10**10})
    held = contest.Contest(jobs.FULL, [], Standings(tmp_path / "attend.json", {}))
    monkeypatch.setattr(contest.jax, "devices", lambda: [device])
    large, small = (jobs.Job(Shape(b, 16384, 32, 32, 128), "fast", Scheme(128, "float8"), 8) for b in (32, 8))
    assert held._too_large(large) == "takes about 13.0 GB of 10.0 GB"
    assert held._too_large(small) is None
    assert held._too_large(small._replace(way="reference")) is None
    assert held._too_large(large._replace(way="reference")) == "takes about 30.1 GB of 10.0 GB"


def test_the_most_telling_comes_first():
    large, small, grouped = Shape(32, 4096, 32, 32, 128), Shape(1, 1024, 32, 32, 128), Shape(32, 4096, 32, 8, 128)
    schemes = list(jobs.SCHEMES.values())
    planned = jobs.schedule([small, large, grouped], 2**17, (16, 8, 4), schemes, None)
    assert planned[0] == jobs.Job(large)
    assert [job.bits for job in planned if job.way == "reference" and job.shape == large][:3] == [4, 8, 16]
    first = [list(dict.fromkeys(job.shape for job in planned)), list(dict.fromkeys(job.scheme for job in planned))]
    assert first == [[large, grouped, small], [None, *schemes]]
    assert len({job.name for job in planned}) == len(planned)
    assert not any(job.bits == 16 for job in planned if job.way == entrants.DEQUANTIZE)
    for shape in (large, small, grouped):
        assert next(job for job in planned if job.shape == shape).way == jobs.PEERS


def test_all_have_a_turn_in_every_round(monkeypatch):
    clock, turns = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def entrant(name, seconds, calls):
        def run():
            turns.append(name)
            clock[0] += seconds

        return Entrant(run, lambda _: None, calls, 1, Error(0, 0))

    taken = timing.race({"a": entrant("a", 1.0, 2), "b": entrant("b", 4.0, 1)}, rounds=2, seconds=2.0)
    assert taken == {"a": [0.5, 0.5], "b": [4.0, 4.0]}
    assert "".join(turns)[-6:] == "aabaab"  # two runs of a fill a turn


def test_ratios():
    entrant = Entrant(lambda: None, lambda _: None, 1, 3_000_000, Error(1e-3, 9e-4))
    own = figures([1e-6, 3e-6, 2e-6, 2e-6, 9e-6], entrant, copy=3e12)
    assert (own["us"], own["us_quartiles"], own["rounds"]) == (pytest.approx(2), pytest.approx([2, 3]), 5)
    assert (own["gbps"], own["of_copy"]) == (pytest.approx(1500), pytest.approx(0.5))
    entrants = {"ours": own, "flash": {"us": 5.0}, "flex": {"us": 4.0}, "cudnn": {"failed": "no"}}
    assert fastest({name: one for name, one in entrants.items() if name != "ours"}) == "flex"
    assert speedup(entrants, "ours", "flash") == pytest.approx(2.5)
    assert speedup(entrants, "ours", "cudnn") is None
    assert fastest({"cudnn": {"failed": "no"}}) is None


def standings_of(path, *rows):
    """Standings of rows (way, shape, cached, bits, us, share of copy, times as fast)."""
    found = {}
    for way, shape, cached, bits, us, share, times in rows:
        own = {"us": us, "of_copy": share, "error": 1.5e-3, "error_of_rounding": 1e-3}
        scheme = None if bits == 16 else "g128-float8"
        job = {"shape": shape, "cached": cached, "way": way, "bits": bits, "scheme": scheme, "speedup": times}
        found[f"{shape} {scheme} {bits} {way}"] = {**job, "peer": "flash", "entrants": {way: own}}
        found[f"{shape} peers"] = {"shape": shape, "way": "peers", "entrants": {"flash": {"us": 100.0, "of_copy": 0.9}}}
    return Standings(path, {"runs": [], "jobs": found, "left_out": []})


def test_floors_take_the_fastest_way_and_the_worst_shape(tmp_path):
    standings = standings_of(
        tmp_path / "attend.json",
        ("triton", "a", 2**17, 4, 50.0, 0.60, 2.0),
        ("mosaic", "a", 2**17, 4, 30.0, 0.80, 3.3),
        ("mosaic", "b", 2**18, 4, 60.0, 0.75, 2.7),
        ("mosaic", "c", 2**10, 4, 90.0, 0.10, 0.5),
        ("dequantize", "a", 2**17, 4, 10.0, 0.99, 9.0),
        ("mosaic", "a", 2**17, 8, 70.0, 0.85, 1.4),
        ("mosaic", "a", 2**17, 16, 99.0, 0.91, None),
    )
    bf16, int8, int4, int2, error = tables.floors(standings, 2**17)
    asked = "g128-float8: int4 >= .70 of copy bandwidth and >= 2.6x best bf16 peer at B*S >= 128k"
    assert int4 == f"{asked}: reached .75, 2.70x (the worst of 2 shapes): met"
    assert int8.endswith("reached .85, 1.40x (the worst of 1 shapes): MISSED")
    assert bf16.endswith("reached .91, no peer (the worst of 1 shapes): met")
    assert int2.endswith("not measured")
    assert error == "relative error <= 0.002: reached 1.5e-03 (rounding to bf16 alone is 1.0e-03): met"


def test_the_tables_have_a_row_a_shape_and_a_column_a_width(tmp_path):
    rows = (("mosaic", "32x4096 32/32", 2**17, 4, 51.234, 0.8, 3.25), ("mosaic", "32x4096 32/32", 2**17, 16, 99, 1, 1))
    title, head, row = tables.tables(standings_of(tmp_path / "attend.json", *rows), (16, 4, 2)).splitlines()
    assert title.startswith("mosaic, g128-float8")
    assert head.split("  ")[0] == "batch x context, heads"
    assert row.split() == "32x4096 32/32 99 1.00 1.00x 51.23 .80 3.25x - flash 100 .90".split()


def test_a_file_of_another_device_can_be_shown(measured, tmp_path, capsys):
    data = read(measured)
    data["runs"][0]["device"] = "NVIDIA Abacus"
    path = tmp_path / "attend.json"
    path.write_text(json.dumps(data))
    assert ours(path, "--show") == 0
    shown = capsys.readouterr().out
    assert "reference, g128-float8" in shown
    assert "relative error <= 0.002" in shown
    assert read(path) == data


def test_the_random_caches_are_no_zeros_and_no_two_are_alike():
    words = np.asarray(noise.bits(3, (64, 1024)))
    assert abs(np.unpackbits(words.view(np.uint8)).mean() - 0.5) < 0.002
    x = np.asarray(noise.normal(4, (64, 1024))).astype(np.float64)
    assert (abs(x.mean()), x.std()) == (pytest.approx(0, abs=0.02), pytest.approx(1, abs=0.02))
    assert abs(np.corrcoef(x.ravel(), np.asarray(noise.normal(5, (64, 1024))).astype(float).ravel())[0, 1]) < 0.02
    layer = caches.random_layer(jnp.asarray(0), Shape(1, 128, 2, 2, 32), Scheme(32, "float8"), 4)
    keys, values = (store.read(layer.lengths) for store in (layer.keys, layer.values))
    assert 0.5 < np.std(keys) < 3
    assert abs(np.corrcoef(np.ravel(keys), np.ravel(values))[0, 1]) < 0.1


@pytest.mark.parametrize(("nbytes", "count"), [(2**30, 1), (2**28, 2), (2**26, 8), (2**25 + 1, 16), (1000, 64)])
def test_enough_caches_go_round_to_leave_the_second_level_cache(nbytes, count):
    assert entrants.sets(nbytes, 2**29) == count


def test_torch_attends_to_the_same_formula():
    pytest.importorskip("torch")
    from benchmarks import attend_peers_torch as peers

    made = peers.PEERS["torch-flash"](Shape(2, 64, 4, 2, 32), 2**16)
    assert (made.calls, made.nbytes) == (2, 2 * 2 * 2 * 2 * 64 * 32)
    assert made.error.whole < 5e-3
    made.wait(made.run())
    peers.release()
