"""What measures whole models on a GPU: sections that end on time, decode steps on a CPU, and sums over a profile."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import pytest

from benchmarks import gpu, gpu_model, gpu_table, gpu_trial
from benchmarks.gpu_cases import MODELS, Case
from benchmarks.gpu_profile import summary
from kernels.gpu import device
from lmmjax.config import from_hf
from lmmjax.llava import shapes


@pytest.mark.parametrize(
    ("section", "code", "said"),
    [
        (gpu.Section("", "json.tool --help", 30), 0, "one: done"),
        (gpu.Section("", "json.tool /nowhere/to/be/found", 30), 1, "one: ended with"),
        (gpu.Section("", "timeit -n 1 -r 1 -s 'import time' 'time.sleep(60)'", 1), 1, "one: stopped after 1 s"),
    ],
    ids=["ends well", "fails", "takes too long"],
)
def test_a_section_that_fails_or_takes_too_long_leaves_the_others(section, code, said, monkeypatch, capfd):
    monkeypatch.setattr(gpu, "SECTIONS", {"one": section, "two": gpu.Section("", "json.tool --help", 30)})
    assert gpu.main(["--smoke"]) == code
    found = capfd.readouterr().err
    assert said in found
    assert "two: done" in found


def test_when_the_time_is_over_nothing_more_begins(capfd):
    assert gpu.main(["--smoke", "--minutes", "0"]) == 1
    assert capfd.readouterr().err.count("left out: the time is over") == len(gpu.SECTIONS)


def test_a_prompt_is_compiled_for_the_weights_that_run():
    config = from_hf(MODELS["smoke"])
    with device.speaking_of(device.EMULATED), ThreadPoolExecutor(1) as pool:  # as on a GPU, q, k and v are one there
        see, read = gpu_model.reading(pool, config)
        like = jax.eval_shape(lambda: gpu_model.running_params(config, "bf16"))
    assert "q_k_v" in like["text"]["layers_0"]["attn"]
    for building in (see, read):
        found = building.result()[0].args_info[0][0]
        assert jax.tree.structure(found) == jax.tree.structure(like)


def test_an_unknown_section_is_refused(capfd):
    assert gpu.main(["kernels"]) == 2
    assert "expected some of tests, attention" in capfd.readouterr().err


@pytest.mark.parametrize("name", gpu.SECTIONS)
def test_a_sections_cases_are_cases(name: str):
    for command in gpu.SECTIONS[name][:2]:
        if "gpu_model" in command:
            gpu_model._parser().parse_args(gpu.shlex.split(command)[1:])


def test_decode_steps_are_measured_beside_what_they_read(tmp_path: Path):
    out = tmp_path / "model.json"
    cases = ["1x64:16:bf16", "2x256:4:int8"]
    assert (
        gpu_model.main(["--model", "smoke", "--new", "8", "--rounds", "1", "--out", str(out), "--cases", *cases]) == 0
    )
    found = json.loads(out.read_text())["cases"]
    config = from_hf(MODELS["smoke"])
    read = sum(
        leaf.size * 2
        for name, part in shapes(config)["text"].items()
        if name != "embedding"
        for leaf in jax.tree.leaves(part)
    )
    # Two layers, two heads of 32 channels, keys and values in bfloat16.
    assert found["1x64 kv16 bf16"]["bytes"] == read + 2 * 2 * 2 * 64 * 32 * 2
    assert found["2x256 kv4 int8"]["bytes"] < read + 2 * 2 * 2 * 2 * 256 * 32
    assert all(one["ms"] > 0 and one["tokens_per_s"] > 0 for one in found.values())


def test_trials_of_unlike_allocations_compile_nothing_more(tmp_path: Path):
    out = tmp_path / "trial.json"
    arguments = ["--model", "smoke", "--tokens", "1300", "--batch", "1", "--trials", "2", "--out", str(out)]
    assert gpu_trial.main(arguments) == 0
    found = json.loads(out.read_text())
    assert found["tokens"] == 2 * (24 * 24 + 64)
    assert found["compiled_again"] == 0
    assert len(found["trial_s"]["runs"]) == 2


def test_what_a_case_is_called_and_written():
    case = Case.parse("16x4096:4:2:4 int8")
    assert case == Case(16, 4096, 4, "2:4 int8")
    assert case.name == "16x4096 kv4 2:4 int8"


def test_a_profile_counts_what_overlaps_once():
    events = [("gemm_1", 0.0, 4000.0), ("gemm_2", 2000.0, 4000.0), ("add", 10000.0, 1000.0)]
    found = summary(events, 2)
    assert found["launches"] == 1.5
    assert found["busy_us"] == 3.5
    assert found["whole_us"] == 5.5
    assert found["kernels"]["gemm"] == {"count": 1.0, "us": 4.0}


def test_products_of_a_layer_are_summed_as_often_as_there_are_linears(tmp_path: Path):
    def row(linear: str, count: int, ours: float) -> dict:
        entrants = {"torch linear": {"us": 8.0, "of_copy": 0.5}, "int8": {"us": ours, "of_copy": 0.25}}
        return {"model": "small", "linear": linear, "m": 1, "count": count, "entrants": entrants}

    about = {"device": "a GPU", "versions": {"jax": "1"}, "date": "2030-01-01T00", "command": "python -m x"}
    path = tmp_path / "weights-nvidia-a.json"
    path.write_text(json.dumps({"about": about, "rows": [row("q", 3, 4.0), row("down", 1, 4.0)]}))
    assert "| int8 | 4.0 (0.25) | 4.0 (0.25) | 2.00x |" in gpu_table.page(tmp_path)
    assert gpu_table.page(tmp_path / "none") == ""
