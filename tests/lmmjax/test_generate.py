"""The command as typed: what goes to stdout and stderr, and one line for everything that cannot be run."""

import importlib.util
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from said import one_line

from lmmjax import checkpoint as checkpoints
from lmmjax import engine, weights
from lmmjax.generate import main
from lmmjax.plan import CacheFormat, LayerPlan, Plan, uniform
from lmmjax.prompt import Processor, pad

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def keep_the_process_as_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Programs compiled here stay out of the user's cache, and JAX is told nothing that outlives a test."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "xla"))
    for name in ("XLA_PYTHON_CLIENT_PREALLOCATE", "TRANSFORMERS_NO_ADVISORY_WARNINGS"):
        monkeypatch.setenv(name, "1")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def ask(checkpoint: Path, image: Path) -> Callable[..., list[str]]:
    """A function that returns the arguments of a question about the image, with these changes."""

    def arguments(*more: str, prompt: str = "what?", images: int = 1) -> list[str]:
        shown = [part for _ in range(images) for part in ("--image", str(image))]
        return ["--model", str(checkpoint), "--prompt", prompt, "--max-tokens", "12", *shown, *more]

    return arguments


def test_text_on_stdout_statistics_on_stderr(ask, checkpoint: Path, image: Path, capsys: pytest.CaptureFixture):
    assert main(ask("--show-prompt")) == 0
    out, err = capsys.readouterr()
    loaded = checkpoints.load(checkpoint)
    processor = Processor.load(checkpoint, loaded.config)
    text = processor.render("what?", 1)
    images = engine.encode_images(loaded.config, loaded.params, processor.pixels([image]))
    ids = engine.generate(
        loaded.config, loaded.params, *pad([processor.encode(text, 1)]), images, max_tokens=12, eos=processor.eos
    )[0]
    assert out == processor.decode(ids) + "\n"
    assert text in err
    for said in ("prefill", "tokens/s", "compile", "weights", "cache", "dense", "reference", "1 x image"):
        assert said in err


def test_json_is_one_line_that_holds_everything(ask, tmp_path: Path, capsys: pytest.CaptureFixture):
    plan = tmp_path / "plan.json"
    text = checkpoints.load(ask()[1]).config.text
    plan.write_text(uniform(text, bits=4, cache=CacheFormat(group=8, dtype="float32")).to_json())
    assert main(ask("--json", "--plan", str(plan))) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 1
    line = json.loads(out)
    assert 1 < line["tokens"] <= 12
    assert line["stopped"] in ("end", "length")
    assert 0 < line["kv_bytes"] < line["kv_dense_bytes"]
    for name in ("text", "vision_ms", "prefill_ms", "decode_ms", "compile_ms", "tokens_per_second", "weights_bytes"):
        assert line[name]
    assert err == ""


def test_the_flags_of_sampling(ask, capsys: pytest.CaptureFixture):
    def text(*more: str) -> str:
        assert main(ask("--json", *more)) == 0
        return json.loads(capsys.readouterr().out)["text"]

    hot = ("--temperature", "5")
    assert text(*hot, "--seed", "1") == text(*hot, "--seed", "1")
    assert text(*hot, "--seed", "1") != text(*hot, "--seed", "2")
    assert text(*hot, "--top-k", "1") == text(*hot, "--top-p", "0.0001") == text()


def test_an_image_from_stdin(ask, image: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    assert main(ask("--json")) == 0
    expected = json.loads(capsys.readouterr().out)["text"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(image.read_bytes())))
    assert main(ask("--json", "--image", "-", images=0)) == 0
    assert json.loads(capsys.readouterr().out)["text"] == expected


def test_raw_takes_the_prompt_as_it_stands(ask, capsys: pytest.CaptureFixture):
    assert main(ask("--raw", "--show-prompt", prompt="one <image> here:")) == 0
    assert capsys.readouterr().err.startswith("one <image> here:\nprompt")


def test_ctrl_c_ends_the_answer_with_130(
    ask, interrupt_second_decode: Callable[[], None], capsys: pytest.CaptureFixture
):
    assert main(ask()) == 0
    whole = capsys.readouterr().out
    interrupt_second_decode()
    assert main(ask()) == 130
    out, err = capsys.readouterr()
    assert whole.startswith(out.rstrip("\n"))
    assert "2 tokens (interrupt)" in err


@pytest.fixture
def dry(monkeypatch: pytest.MonkeyPatch, checkpoint: Path, capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """A function that returns what a dry run prints, and sees to its exit code; no weight is read."""

    def refuse(*_):
        raise AssertionError("a dry run read weights")

    def printed(*more: str, code: int = 0) -> str:
        with monkeypatch.context() as patch:
            patch.setattr(weights, "read_tree", refuse)
            assert main(["--model", str(checkpoint), "--dry-run", *more]) == code
        out, err = capsys.readouterr()
        assert err == ""
        return out

    return printed


@pytest.fixture
def plans(tmp_path: Path) -> Callable[..., str]:
    """A function that writes a plan for the checkpoint's two layers and returns its path."""

    def written(*layers: LayerPlan, **form) -> str:
        plan = Plan(layers, cache=CacheFormat(group=8, **form))
        (tmp_path / "plan.json").write_text(plan.to_json())
        return str(tmp_path / "plan.json")

    return written


APART = (LayerPlan(8, 4, visual_key_bits=2), LayerPlan(3, 16))


@pytest.mark.parametrize("layers", [None, (LayerPlan(4, 2), LayerPlan(16, 8)), APART], ids=["dense", "mixed", "apart"])
def test_a_dry_run_says_the_bytes_that_the_run_takes(ask, dry, plans, layers, capsys: pytest.CaptureFixture):
    more = ("--plan", plans(*layers)) if layers else ()
    question = ask("--json", *more)
    said = json.loads(dry(*question[2:]))
    assert main(question) == 0
    took = json.loads(capsys.readouterr().out)
    assert said["weights"] == took["weights_bytes"]
    assert said["kv"]["total"] == took["kv_bytes"]
    assert said["capacity"] == took["kv_capacity"]
    assert said["context"] == took["prompt_tokens"] + 12
    assert said["kv_dense"] == took["kv_dense_bytes"]
    assert (said["memory"], said["fits"]) == (None, None)


def test_a_dry_run_says_whether_it_fits(dry):
    total = json.loads(dry("--json"))["total"]
    said = json.loads(dry("--json", "--memory", f"{total}B"))
    assert (said["memory"], said["fits"]) == (total, True)
    assert json.loads(dry("--json", "--memory", f"{total - 1}B", code=1))["fits"] is False
    assert "fits, " in dry("--memory", "8GiB")
    assert "DOES NOT FIT, " in dry("--memory", "10 kB", code=1)


def test_a_dry_run_of_rows_and_contexts(dry, plans):
    """Without a question: the model's context, or what is asked for, in buckets and groups as the engine makes them."""
    whole, part, more = (
        json.loads(dry("--json", *rows)) for rows in ((), ("--context", "70"), ("--context", "70", "--batch", "3"))
    )
    assert (whole["batch"], whole["context"], whole["capacity"]) == (1, 128, 128)
    assert (part["context"], part["capacity"]) == (70, 96)
    assert more["kv"]["total"] == 3 * part["kv"]["total"] == 3 * 96 / 128 * whole["kv"]["total"]
    assert more["weights"] == whole["weights"]
    assert json.loads(dry("--json", "--plan", plans(*APART)))["images"] == 4  # one image of the checkpoint's


def test_a_dry_run_prints_a_page(dry, plans):
    page = dry("--context", "70", "--plan", plans(*APART, window=8), "--memory", "1MB")
    rows = [line.split() for line in page.splitlines()]
    assert rows[0] == ["weights", "K,", "V", "(text/image)", "codes", "scales", "exact", "KV"]
    for start in (["layer", "0"], ["layer", "1"], ["all"], ["text.lm_head"], ["vision"]):
        assert [row for row in rows if row[: len(start)] == start]
    assert "8/2, 4/4" in page
    assert "1 x 88 tokens (asked: 70, 4 of them of images)" in page
    assert "not counted: activations" in page
    plain = dry()
    assert "layers 0-1, each" in plain
    assert "K, V bits" in plain


BAD_FLAGS = {
    "--memory: got 8GiB without --dry-run": ("--memory", "8GiB"),
    "--batch: got 2 without --dry-run": ("--batch", "2"),
    "--memory: got '8'": ("--dry-run", "--memory", "8"),
    "--batch: got 0, expected a whole number from 1": ("--dry-run", "--batch", "0"),
    "--context: got 64 beside a prompt": ("--dry-run", "--context", "64"),
    "--max-tokens: got 0": ("--max-tokens", "0"),
    "--temperature: got -1.0": ("--temperature", "-1"),
    "--temperature: got nan": ("--temperature", "nan"),
    "--top-p: got 0.0": ("--top-p", "0"),
    "--max-tokens: got 99999999999": ("--max-tokens", "99999999999"),
    "--top-k: got -1": ("--top-k", "-1"),
    "--top-k: got 99999999999": ("--top-k", "99999999999"),
    "--seed: got -1": ("--seed", "-1"),
    "--backend: got fast, expected one of mosaic, triton, reference": ("--backend", "fast"),
    "image missing.png: No such file": ("--image", "missing.png"),
    "no directory nowhere": ("--model", "nowhere"),
    "cannot read missing.json": ("--plan", "missing.json"),
    "no image token": ("--raw",),
}


@pytest.mark.parametrize("says", BAD_FLAGS)
def test_bad_flags_end_in_one_line(ask, says: str, capsys: pytest.CaptureFixture):
    assert main(ask(*BAD_FLAGS[says])) == 2
    assert says in one_line(capsys)


@pytest.mark.parametrize(
    ("flag", "got"),
    [
        *[
            ("--memory", got)
            for got in ("", "8 apples", "GiB", "-1GiB", "nanGB", "0MB", "8iB", "1e3GB", "9" * 400 + "GB")
        ],
        *[("--batch", got) for got in ("", "-1", "1.5", "many", "2147483648")],
        *[("--context", got) for got in ("0", "x", "129")],
    ],
)
def test_bad_numbers_of_a_dry_run_end_in_one_line(checkpoint: Path, flag: str, got: str, capsys: pytest.CaptureFixture):
    assert main(["--model", str(checkpoint), "--dry-run", f"{flag}={got}"]) == 2
    assert f"{flag}: got " in one_line(capsys)


def test_bad_prompts_end_in_one_line(ask, checkpoint: Path, capsys: pytest.CaptureFixture):
    cases = {
        "2 <image> for 1 image": ask(prompt="<image> <image>"),
        "do not fit the model's context of 128": ask(prompt="x" * 200),
        "holds half a character": ask(prompt="\udc80"),
        "--prompt: got an empty text": ["--model", str(checkpoint), "--prompt", ""],
        "--prompt: none given": ["--model", str(checkpoint)],
    }
    for says, argv in cases.items():
        assert main(argv) == 2
        assert says in one_line(capsys)


def test_bad_plans_end_in_one_line(ask, tmp_path: Path, capsys: pytest.CaptureFixture):
    text = checkpoints.load(ask()[1]).config.text
    longer = uniform(text).to_json().replace('"layers": [', '"layers": [\n {"key_bits": 16},', 1)
    for content, says in (("{", "plan: not JSON"), (longer, "got 3 layers, expected the model's 2")):
        (tmp_path / "plan.json").write_text(content)
        assert main(ask("--plan", str(tmp_path / "plan.json"))) == 2
        assert says in one_line(capsys)


def test_a_hugging_face_directory_is_told_how_to_convert(hf_checkpoint, capsys: pytest.CaptureFixture):
    assert main(["--model", str(hf_checkpoint()), "--prompt", "what?"]) == 2
    assert "python -m convert.hf" in one_line(capsys)


def test_help_and_mistyped_flags_import_nothing_heavy():
    code = (
        "import sys, lmmjax.generate as g\ntry: g.main(sys.argv[1:])\n"
        "except SystemExit as e: print(e.code, sorted({'jax', 'flax', 'transformers', 'torch'} & set(sys.modules)))"
    )
    for flag, expected in (("--help", "0 []"), ("--nonsense", "2 []")):
        done = subprocess.run([sys.executable, "-c", code, flag], cwd=ROOT, capture_output=True, text=True)
        assert done.stdout.splitlines()[-1] == expected


def test_a_second_process_compiles_nothing(ask, tmp_path: Path):
    """Other prompts of the same bucket find every program in the user's cache directory."""
    code = (
        "import sys, collections, jax, lmmjax.generate as g\ncounts = collections.Counter()\n"
        "jax.monitoring.register_event_listener(lambda event, **_: counts.update([event.rsplit('/')[-1]]))\n"
        "g.main(sys.argv[1:])\nprint(counts['cache_misses'], counts['cache_hits'])"
    )
    environment = {**os.environ, "LMMJAX_CACHE": str(tmp_path), "PYTHONPATH": str(ROOT)}
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    del environment["JAX_COMPILATION_CACHE_DIR"]

    def misses_and_hits(prompt: str) -> list[int]:
        command = [sys.executable, "-W", "error", "-c", code, *ask("--json", prompt=prompt)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert done.stderr == ""
        return [int(count) for count in done.stdout.splitlines()[-1].split()]

    first, second = misses_and_hits("what?"), misses_and_hits("who is?")
    assert first[0] > 2
    assert second[0] == 0
    assert second[1] >= first[0]
    assert list((tmp_path / "xla").glob("jit_decode*"))


@pytest.mark.skipif(not checkpoints.EMBEDDED.exists(), reason="the embedded model is not there")
def test_without_arguments_the_embedded_model_answers(tmp_path: Path):
    environment = {**os.environ, "LMMJAX_CACHE": str(tmp_path), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    command = [sys.executable, "-m", "lmmjax.generate"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    right = done.stderr.split("(right: ")[1].split(")")[0]
    assert done.stdout.strip() == right


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="the peer is transformers on torch")
def test_thirty_two_greedy_tokens_are_those_of_transformers(checkpoint: Path, hf_checkpoint, image: Path):
    """A batch of unequal prompts here, one with two images, against one prompt at a time there."""
    import torch
    from transformers import LlavaForConditionalGeneration

    loaded = checkpoints.load(checkpoint)
    processor = Processor.load(checkpoint, loaded.config)
    prompts = [processor.encode(processor.render(text, n), n) for text, n in (("what is it?", 1), ("same?", 2))]
    pixels = processor.pixels([image, image, Image.new("RGB", (28, 28), "red")])
    images = engine.encode_images(loaded.config, loaded.params, pixels)
    got = engine.generate(loaded.config, loaded.params, *pad(prompts), images, max_tokens=32)
    peer = LlavaForConditionalGeneration.from_pretrained(hf_checkpoint()).eval()
    for row, (prompt, own) in enumerate(zip(prompts, (pixels[:1], pixels[1:]), strict=True)):
        with torch.no_grad():
            ids = peer.generate(
                input_ids=torch.tensor([prompt]),
                pixel_values=torch.tensor(own),
                max_new_tokens=32,
                do_sample=False,
                eos_token_id=None,
            )
        assert got[row] == ids[0, len(prompt) :].tolist()
