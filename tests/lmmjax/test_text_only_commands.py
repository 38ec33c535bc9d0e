"""A decoder alone through the commands: asked, scored, measured, counted; and one line where it should see an image."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from said import one_line
from tiny_texts import text_config, write_text

from convert import hf
from lmmjax import checkpoint as checkpoints
from lmmjax import data, engine, evaluate, generate, llava, perplexity, sensitivity, weights
from lmmjax.errors import InputError
from lmmjax.memory import memory_report
from lmmjax.plan import CacheFormat, LayerPlan, Plan
from lmmjax.prompt import Processor, pad


@pytest.fixture(autouse=True)
def keep_the_process_as_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """What the commands set in the environment ends with the test."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "xla"))
    names = "XLA_PYTHON_CLIENT_PREALLOCATE TRANSFORMERS_NO_ADVISORY_WARNINGS HF_HUB_OFFLINE TRANSFORMERS_OFFLINE"
    for name in names.split():
        monkeypatch.setenv(name, "1")


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The lmmjax checkpoint of a decoder alone with a chat template. Read only."""
    directory = tmp_path_factory.mktemp("text")
    hf.convert(write_text(directory / "hf", text_config()), directory / "model")
    return directory / "model"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    return tmp_path / "red.png"


@pytest.fixture
def book(tmp_path: Path) -> Path:
    letters = np.random.default_rng(0).integers(97, 123, 127)  # and one token that begins the text
    (tmp_path / "book.txt").write_text(bytes(letters.tolist()).decode())
    return tmp_path / "book.txt"


def test_the_config_of_a_decoder_alone(reader: Path):
    config = checkpoints.load(reader).config
    assert (config.vision, config.image_token, config.sees, config.image_tokens) == (None, None, False, 0)
    assert not config.is_image(np.arange(-1, 300)).any()
    assert not llava.image_tokens(config, jnp.arange(4)[None]).any()
    with pytest.raises(InputError, match="no vision tower"):
        _ = config.tower
    made = jax.eval_shape(lambda: llava.init(config, jax.random.key(0)))
    assert set(made) == {"text"}
    assert jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), made) == jax.tree.map(
        lambda leaf: (leaf.shape, "float32"), llava.shapes(config)
    )


def test_prompts_are_plain_text_and_images_are_refused(reader: Path, image: Path, tmp_path: Path):
    config = checkpoints.load(reader).config
    processor = Processor.load(reader, config)
    assert processor.render("what <image>?", 0) == "[user] what <image>?\n[assistant]"
    assert processor.render("what?", 0, "Brief.") == "[system] Brief.\n[user] what?\n[assistant]"
    assert processor.image_token is None
    assert processor.encode("ab", 0) == [1, *processor.tokenizer.encode("ab", add_special_tokens=False)]
    assert processor.pixels([]).size == 0
    for refused in (
        lambda: processor.render("what?", 1),
        lambda: processor.encode("what?", 1),
        lambda: processor.pixels([image]),
        lambda: data.encode(processor, [data.Sample(image, "what?", "red", "any")]),  # as a search asks
    ):
        with pytest.raises(InputError, match="has no vision tower and reads text alone"):
            refused()
    bare = write_text(tmp_path / "bare", text_config(), chat=False)
    assert Processor.load(bare, config).render("once upon", 0) == "once upon"


def test_a_text_is_continued(reader: Path, capsys: pytest.CaptureFixture):
    words = ["--model", str(reader), "--prompt", "hi", "--max-tokens", "8", "--json"]
    assert generate.main([*words, "--show-prompt"]) == 0
    out, err = capsys.readouterr()
    took = json.loads(out)
    assert err == "[user] hi\n[assistant]\n"
    assert (took["images"], took["vision_ms"]) == (0, 0)
    loaded = checkpoints.load(reader)
    processor = Processor.load(reader, loaded.config)
    ids = processor.encode(err.removesuffix("\n"), 0)
    (answer,) = engine.generate(loaded.config, loaded.params, *pad([ids]), max_tokens=8, eos=processor.eos)
    assert took["text"] == processor.decode(answer).removeprefix(" ")
    assert generate.main([*words, "--dry-run"]) == 0
    said = json.loads(capsys.readouterr().out)
    for ours, theirs in (("weights", "weights_bytes"), ("capacity", "kv_capacity")):
        assert said[ours] == took[theirs]
    assert said["kv"]["total"] == took["kv_bytes"]


def test_bytes_are_counted_without_a_tower(reader: Path, capsys: pytest.CaptureFixture):
    loaded = checkpoints.load(reader)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(loaded.params))
    plan = Plan((LayerPlan(8, 4, visual_key_bits=2), LayerPlan(4, 4)), cache=CacheFormat(group=8))
    for chosen in (None, plan):
        report = memory_report(loaded.config, chosen, 2, 40, "float32")
        assert report.weights == held
        assert report.kv.total == engine.new_cache(loaded.config, loaded.params, chosen, 2, 40).nbytes
        assert set(report.parts) == {"text.embedding", "text.norm", "text.lm_head"}
    assert generate.main(["--model", str(reader), "--dry-run", "--context", "70"]) == 0
    page = capsys.readouterr().out
    assert "text.embedding" in page
    assert "vision" not in page
    assert "1 x 96 tokens (asked: 70)" in page


def test_an_image_for_a_decoder_alone_is_one_line(reader: Path, image: Path, capsys: pytest.CaptureFixture):
    for more in ((), ("--dry-run",)):
        assert generate.main(["--model", str(reader), "--image", str(image), "--prompt", "what?", *more]) == 2
        assert f"--image: {reader} has no vision tower" in one_line(capsys)


def test_perplexity_of_text(reader: Path, book: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    """Windows side by side, as published tables have them, against the logits of each window alone."""
    words = ["--model", str(reader), "--text", str(book), "--context", "64", "--stride", "64"]
    assert evaluate.main([*words, "--out", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    loaded = checkpoints.load(reader)
    (ids,) = perplexity.read(Processor.load(reader, loaded.config), [book])
    rows = jnp.array(ids).reshape(2, 64)

    @jax.jit
    def log_probs(params: llava.Params, rows: jax.Array) -> jax.Array:
        mask, positions = jnp.tril(jnp.ones((2, 64, 64), bool)), jnp.broadcast_to(jnp.arange(64), (2, 64))
        states = llava.forward(loaded.config, params, llava.embed(loaded.config, params, rows), positions, mask)
        return jax.nn.log_softmax(llava.logits(loaded.config, params, states))

    own = np.take_along_axis(np.asarray(log_probs(loaded.params, rows))[:, :-1], np.asarray(rows)[:, 1:, None], -1)
    assert results["figures"]["perplexity"]["model"]["value"] == pytest.approx(np.exp(-own.mean()), rel=1e-4)


def test_questions_about_images_are_refused_and_blind_ones_answered(
    reader: Path, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    task = tmp_path / "asked.jsonl"
    task.write_text(json.dumps({"question_id": 1, "image": image.name, "text": "what?"}) + "\n")
    words = ["--model", str(reader), "--task", str(task), "--max-tokens", "8", "--out", str(tmp_path / "out")]
    assert evaluate.main(words) == 2
    assert "--task: " in (line := one_line(capsys))
    assert "has no vision tower" in line
    assert not (tmp_path / "out").exists()
    assert evaluate.main([*words, "--images", "none"]) == 0
    (answer,) = (tmp_path / "out" / "answers.jsonl").read_text().splitlines()
    assert json.loads(answer)["prompt"] == "what?"


def test_sensitivity_on_text(reader: Path, book: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    words = ["--model", str(reader), "--samples", "3", "--batch", "3", "--group", "8", "--out", str(tmp_path / "out")]
    assert sensitivity.main([*words, "--text", str(book), "--length", "32"]) == 0
    figures = json.loads((tmp_path / "out" / "sensitivity.json").read_text())
    assert (figures["settings"]["data"], figures["settings"]["length"]) == (str(book), 32)
    for measure in ("attention_error", "loss_change"):
        for side in ("keys", "values"):
            table = np.array(figures[measure][side])
            assert table.shape == (2, len(figures["bits"]))
            assert (np.diff(table, axis=1) > 0).all()
    loaded = checkpoints.load(reader)
    assert figures["settings"]["weights"] == weights.digest(loaded.params).hexdigest()[:16]
    capsys.readouterr()
    for more, message in (
        ((), "has no vision tower and reads text alone, but the questions show images; give --text FILE"),
        (("--text", str(book), "--data", "easy-vqa"), "--data: got easy-vqa beside --text"),
        (("--length", "32"), "--length: got 32 without --text"),
        (("--text", str(book), "--length", "129"), "--length: got 129, expected at most the model's context of 128"),
    ):
        assert sensitivity.main([*words, *more]) == 2
        assert message in one_line(capsys)
