"""smol's training: adapters change nothing at first, files hold what was trained, a killed run is the same run."""

import argparse
import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_parts import tensors, write_clip, write_llama, write_projector

from convert.assemble import assemble
from examples.smol import adapter, batches, build, learning, lora, report, train
from examples.smol.batches import Batches, Stage
from examples.smol.learning import Frozen, Objective
from examples.vqa.packing import answer_shares, images_of, pack
from lmmjax import checkpoint, llava
from lmmjax.data import KINDS, answer_ids, load
from lmmjax.errors import InputError
from lmmjax.prompt import Processor

pytestmark = pytest.mark.slow

STAGES = (Stage("align", 1, 2, 2), Stage("name", 2, 2, 2), Stage("match", 3, 2, 3))


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("parts")
    return {
        "vision": write_clip(folder / "clip", tensors()),
        "text": write_llama(folder / "llama", tensors()),
        "projector": write_projector(folder / "projector.safetensors", tensors()),
    }


@pytest.fixture(scope="module")
def model(parts, tmp_path_factory) -> checkpoint.Checkpoint:
    target = tmp_path_factory.mktemp("base") / "model"
    assemble(parts["vision"], parts["text"], target, projector=parts["projector"])
    return checkpoint.load(target)


@pytest.fixture(scope="module")
def processor(model) -> Processor:
    return Processor.load(model.path, model.config)


@pytest.fixture(scope="module")
def samples():
    return load("easy-vqa", "train")[:60]


@pytest.fixture(scope="module")
def packed(model, processor, samples):
    features = report.features_of(model, processor, images_of(samples))
    return pack(processor, samples, answer_shares(samples), features)


@pytest.fixture
def source(packed) -> Batches:
    return Batches(packed, np.arange(200, dtype=np.int32) % 100 + 4, 12, STAGES, seed=0)


def factors_of(config, seed: int = 1):
    """Adapters that do change something."""
    start = lora.initial_factors(config, jax.random.key(seed))
    return jax.tree.map(lambda leaf: leaf + 0.05 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), start)


def whole_logits(model, processor, sample):
    """The tokens of one whole sequence, unpacked, and what computes its logits, padded so that one program does."""
    text = processor.render(sample.question, 1)
    tokens = processor.encode(text, 1) + answer_ids(processor, text, sample.answer)
    return tokens, functools.partial(_logits, model.config, np.array([tokens + [0] * (160 - len(tokens))]))


@functools.partial(jax.jit, static_argnums=0)
def _logits(config, tokens, params, features):
    x = llava.embed(config, params, tokens, llava.project(config, params, features))
    t = tokens.shape[1]
    states = llava.forward(config, params, x, jnp.arange(t)[None], jnp.tri(t, dtype=bool)[None])
    return llava.logits(config, params, states)


def merged(params, factors):
    """Every adapted kernel, added up."""
    adapted = lora.adapt(params, factors)
    is_leaf = lambda leaf: isinstance(leaf, lora.Adapted)  # noqa: E731
    add = lambda leaf: leaf.kernel + leaf.down @ leaf.up * lora.SCALE if is_leaf(leaf) else leaf  # noqa: E731
    return jax.tree.map(add, adapted, is_leaf=is_leaf)


def test_fresh_adapters_change_nothing_and_trained_ones_add_up(model):
    x = jax.random.normal(jax.random.key(0), (1, 5, model.config.text.width))
    at, mask = jnp.arange(5)[None], jnp.tri(5, dtype=bool)[None]
    run = jax.jit(lambda params: llava.forward(model.config, params, x, at, mask))
    fresh = lora.adapt(model.params, lora.initial_factors(model.config, jax.random.key(0)))
    np.testing.assert_array_equal(run(fresh), run(model.params))
    factors = factors_of(model.config)
    assert np.abs(run(lora.adapt(model.params, factors)) - run(model.params)).max() > 0.01
    np.testing.assert_allclose(run(lora.adapt(model.params, factors)), run(merged(model.params, factors)), atol=2e-5)


def test_the_loss_is_the_mean_over_the_answers_of_whole_unpacked_sequences(model, processor, samples, packed):
    factors = factors_of(model.config)
    trained = {"projector": model.params["projector"], "lora": factors}
    images, chosen = packed.rows(3)
    rows = batches.rows(packed, images, chosen)
    objective = Objective(model.config, len(packed.prefix), 3)
    frozen = Frozen({"text": model.params["text"]}, jnp.ones(()))
    text = jnp.asarray(np.arange(10, 22)[None])
    params = merged(model.params, factors)
    order = {image: index for index, image in enumerate(images_of(samples))}
    losses, right = [], []
    for sample in samples:
        shown = packed.shown[order[sample.image]][None]
        tokens, logits = whole_logits(model, processor, sample)
        answer = answer_ids(processor, processor.render(sample.question, 1), sample.answer)
        at = np.arange(len(tokens) - len(answer), len(tokens))
        predicted = jax.nn.log_softmax(np.asarray(logits(params, shown))[0, at - 1])
        losses.extend(-np.asarray(predicted)[np.arange(len(answer)), answer])
        right.append(bool((predicted.argmax(-1) == np.array(answer)).all()))
    both = jax.jit(objective.answering)(trained, frozen, rows, text)
    of_text = jax.jit(learning.text_loss, static_argnums=0)(model.config, params, text)
    expected = np.mean(losses) + learning.TEXT_WEIGHT * of_text
    assert float(both) == pytest.approx(float(expected), rel=1e-4)
    judging = report.judge(model, frozen, packed, 3)(trained)
    found = np.zeros(len(samples), bool)
    verdicts = judging(images, chosen)
    found[chosen[chosen >= 0]] = verdicts[chosen >= 0]
    np.testing.assert_array_equal(found, right)


def test_folding_moves_both_scalings_into_the_projector(model):
    config = model.config
    projector = learning.initial_params(config, 0)["projector"]
    features = jax.random.normal(jax.random.key(1), (2, 4, config.vision.width)) * 3 + 1
    mean, deviation, size = features.mean((0, 1)), features.std((0, 1)), jnp.asarray(0.2)
    plain = learning.fold(projector, mean, deviation, size)
    expected = size * llava.project(config, {"projector": projector}, (features - mean) / deviation)
    np.testing.assert_allclose(llava.project(config, {"projector": plain}, features), expected, atol=1e-5)


def test_the_written_adapter_assembles_to_what_was_trained(parts, model, tmp_path):
    factors = factors_of(model.config)
    adapter.write(tmp_path / "adapter", model.params["projector"], factors)
    tensors_written = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors_written.values()} == {np.dtype("float16")}
    projector = tmp_path / "adapter" / adapter.PROJECTOR
    assemble(parts["vision"], parts["text"], tmp_path / "out", projector=projector, lora=tmp_path / "adapter")
    finished = checkpoint.load(tmp_path / "out").params
    expected = merged(model.params, factors)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), finished["text"], expected["text"])
    q = finished["text"]["layers_1"]["attn"]["q"]["kernel"]
    assert np.abs(q - model.params["text"]["layers_1"]["attn"]["q"]["kernel"]).max() > 0.02


def test_the_command_makes_a_checkpoint_of_given_parts(parts, model, tmp_path, monkeypatch):
    """In SmolLM2's conversation, the image before the text; the tower's patches have 14 pixels here."""
    monkeypatch.setattr(build, "IMAGE_SIZE", 42)
    monkeypatch.setattr(build, "IMAGE_TOKEN", model.config.image_token)
    adapter.write(tmp_path / "adapter", model.params["projector"], factors_of(model.config))
    given = {"adapter": tmp_path / "adapter", "vision": parts["vision"], "text": parts["text"]}
    arguments = [str(part) for name, value in given.items() for part in (f"--{name}", value)]
    assert build.main([*arguments, "--out", str(tmp_path / "out"), "--hf", str(tmp_path / "hf")]) == 0
    built = checkpoint.load(tmp_path / "out")
    assert built.config.vision.image_tokens == 9
    assert (tmp_path / "hf" / "model.safetensors").exists()
    rendered = Processor.load(built.path, built.config).render("What?", 1, system="Be brief.")
    turns = ("system\nBe brief.", "user\n<image>\nWhat?")
    assert rendered == "".join(f"<|im_start|>{turn}<|im_end|>\n" for turn in turns) + "<|im_start|>assistant\n"


def test_texts_are_read_whole_or_refused(processor, tmp_path):
    (tmp_path / "a.txt").write_text("ab")
    (tmp_path / "b.txt").write_bytes("cé".encode())
    files = sorted(tmp_path.iterdir())
    tokens = batches.read_text(processor, files, window=4)
    assert processor.decode(tokens) == "abcé"
    with pytest.raises(InputError, match=f"--texts: {len(tokens)} tokens, expected more than the --window of 20"):
        batches.read_text(processor, files, window=20)
    files[0].write_bytes(b"\xff")
    with pytest.raises(InputError, match="not UTF-8"):
        batches.read_text(processor, files, window=4)


def test_stages_follow_one_another_and_open_questions_come_first(source, packed):
    assert [source.stage(step).name for step in range(6)] == ["align", *["name"] * 2, *["match"] * 3]
    with pytest.raises(IndexError):
        source.stage(6)
    yes_no = packed.kinds == KINDS.index("yes/no")
    naming, matching = (source._weights(stage) / packed.surprise for stage in STAGES[1:])
    np.testing.assert_allclose(naming, np.where(yes_no, batches.RARE, 1))
    np.testing.assert_allclose(matching, np.where(yes_no, 1, batches.RARE))


def test_a_batch_is_a_function_of_seed_and_step(source):
    first, again = source(2), source(2)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    other = dataclasses.replace(source, seed=1)(2)
    assert not np.array_equal(first[1], other[1])
    rows, text = first
    assert text.shape == (1, 12)
    answers = rows.tokens[np.arange(len(rows.tokens))[:, None], rows.at]
    eos = 2
    assert (answers[rows.counted] == eos).sum() == rows.tokens.shape[0] * 2  # two questions a row, each ended


class Killed(Batches):
    """Batches of a run that is killed in its last step."""

    def __call__(self, step):
        if step == self.steps - 1:
            raise KeyboardInterrupt
        return super().__call__(step)


def test_a_killed_run_goes_on_to_the_same_weights_and_log(tmp_path, model, packed, source):
    def run(name, kind):
        args = argparse.Namespace(out=tmp_path / name, projector_rate=1e-2, adapter_rate=1e-2, seed=0, every=2)
        args.out.mkdir(exist_ok=True)
        return train.train(args, model, kind(**vars(source)), packed)

    whole = run("whole", Batches)
    with pytest.raises(KeyboardInterrupt):
        run("killed", Killed)
    resumed = run("killed", Batches)
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("whole", "killed")]
    lines = [[(line["step"], line["loss"], line["all"]) for line in map(json.loads, log)] for log in logs]
    assert [step for step, *_ in lines[0]] == [2, 4, 6]
    assert lines[0] == lines[1]
    start = learning.initial_params(model.config, 0)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), whole.params, start)
    assert min(jax.tree.leaves(moved)) > 0
