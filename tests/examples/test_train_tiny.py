"""The training example: packing changes no answer, moving cuts no shape, a killed run is the same run."""

import argparse
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples import train_tiny
from examples.tiny import house, learning
from examples.tiny.batches import Batches, image_labels
from examples.tiny.moving import Mover
from examples.vqa import measure, training
from examples.vqa.packing import answer_shares, hold_out, images_of, pack
from lmmjax import llava
from lmmjax.data import encode, load
from lmmjax.errors import InputError
from lmmjax.prompt import Processor

pytestmark = pytest.mark.slow

CONFIG = dataclasses.replace(
    learning.CONFIG,
    vision=dataclasses.replace(learning.CONFIG.vision, layers=1, feature_layers=(1,)),
    text=dataclasses.replace(learning.CONFIG.text, layers=1),
)
"""`tiny` with fewer layers, which compile sooner."""


@pytest.fixture(autouse=True)
def few_layers(monkeypatch):
    monkeypatch.setattr(learning, "CONFIG", CONFIG)


@pytest.fixture(scope="module")
def samples():
    return load("easy-vqa", "train")[:60]


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    directory = tmp_path_factory.mktemp("house")
    texts = (f"USER: \n{sample.question} ASSISTANT: {sample.answer}" for sample in load("easy-vqa", "train"))
    house.write_all_but_weights(directory, texts)
    return Processor.load(directory, CONFIG)


@pytest.fixture(scope="module")
def packed(processor, samples):
    return pack(processor, samples, answer_shares(samples), processor.pixels(images_of(samples)))


def test_the_prompt_is_llavas_and_any_byte_has_an_id(processor):
    text = processor.render("what is \u732b?", 1)
    assert text == "USER: <image>\nwhat is \u732b? ASSISTANT:"
    ids = processor.encode(text, 1)
    assert ids[0] == house.BOS
    assert ids.count(house.IMAGE) == CONFIG.vision.image_tokens
    assert processor.decode(ids) == "USER: \nwhat is \u732b? ASSISTANT:"
    assert len(processor.tokenizer) == house.VOCAB
    assert processor.eos == (house.EOS,)
    assert processor.render("q", 1, system="Be short.") == "Be short. USER: <image>\nq ASSISTANT:"


def test_a_packed_question_gets_the_logits_it_gets_alone(processor, samples, packed):
    params = llava.init(CONFIG, jax.random.key(0))
    images, chosen = packed.rows(questions=4)
    tokens, is_answer = packed.tokens(chosen)
    together, _ = jax.jit(learning.answer_logits)(params, *map(jnp.asarray, (packed.shown[images], tokens, is_answer)))
    alone = encode(processor, samples)
    t = alone.tokens.shape[1]

    @jax.jit
    def logits(tokens, pixels):
        x = llava.embed(CONFIG, params, tokens, llava.encode_images(CONFIG, params, pixels))
        states = llava.forward(CONFIG, params, x, jnp.arange(t)[None], jnp.tri(t, dtype=bool)[None])
        return llava.logits(CONFIG, params, states)

    expected = np.asarray(logits(alone.tokens, alone.pixels))[:, :-1][alone.is_answer[:, 1:]]
    order = np.argsort(chosen[chosen >= 0])  # every sample's answer and end: two predictions each
    got = np.asarray(together)[is_answer[..., 1:]].reshape(len(samples), 2, -1)[order]
    np.testing.assert_allclose(got.reshape(expected.shape), expected, atol=1e-4)


def test_every_question_is_packed_once_and_draws_repeat_none(packed):
    _, chosen = packed.rows(questions=4)
    assert sorted(chosen[chosen >= 0]) == list(range(len(packed.blocks)))
    drawn = packed.draw(np.random.default_rng(0), np.arange(len(packed.members)), 5, packed.surprise)
    for row, members in zip(drawn, packed.members, strict=True):
        real = row[row >= 0]
        assert len(set(real)) == len(real) == min(5, (members >= 0).sum())
        assert set(real) <= set(members)


def test_weights_make_surprising_answers_frequent(packed):
    surprise = np.where(packed.kinds == 0, 1.0, 50.0)
    images = np.resize(np.arange(len(packed.members)), 300)
    drawn = [packed.draw(np.random.default_rng(1), images, 1, each) for each in (np.ones_like(surprise), surprise)]
    rare = [(packed.kinds[chosen] != 0).mean() for chosen in drawn]
    assert rare[0] == pytest.approx((packed.kinds != 0).mean(), abs=0.1)
    assert rare[1] > 0.9


def test_moving_keeps_the_shape_whole_and_every_pixel(packed):
    mover, images = Mover(packed.shown), np.arange(len(packed.shown))
    moved = mover(np.random.default_rng(0), packed.shown, images)
    after = Mover(moved)
    assert (mover.rows != after.rows).any()
    np.testing.assert_array_equal(mover.rows.sum(1), after.rows.sum(1))
    np.testing.assert_array_equal(mover.columns.sum(1), after.columns.sum(1))
    before, after = (np.sort(pixels.reshape(len(pixels), -1), axis=1) for pixels in (packed.shown, moved))
    np.testing.assert_array_equal(before, after)


def test_labels_come_from_answers_alone(samples):
    labels = image_labels(samples)
    rows = {image: row for row, image in enumerate(dict.fromkeys(sample.image for sample in samples))}
    for sample in samples:
        if sample.kind == "shape":
            assert learning.SHAPES[labels[rows[sample.image], 0]] == sample.answer
        elif sample.kind == "colour":
            assert learning.COLOURS[labels[rows[sample.image], 1]] == sample.answer


def test_the_blind_baseline_is_the_published_one():
    train, test = load("easy-vqa", "train"), load("easy-vqa", "test")
    right = measure.blind(answer_shares(train), test)
    assert right.mean() == pytest.approx(0.670, abs=5e-4)


def test_held_out_images_are_not_trained_on(samples):
    trained, held = hold_out(samples, images=2, seed=0)
    assert len(trained) + len(held) == len(samples)
    assert len({sample.image for sample in held}) == 2
    assert not {sample.image for sample in held} & {sample.image for sample in trained}


def test_a_run_goes_on_as_it_was_begun_or_not_at_all(tmp_path):
    begun = {"seed": 0, "steps": [2, 3], "rate": 1e-3}
    training.claim(tmp_path, begun)
    training.claim(tmp_path, begun)
    with pytest.raises(InputError, match=r"has steps = \[2, 3\], not \[2, 4\]; give the same, or another --out"):
        training.claim(tmp_path, {**begun, "steps": [2, 4]})


def test_another_models_state_is_no_beginning(tmp_path):
    optimizer = learning.make_optimizer(1e-3, 2, 2)
    small, large = (training.initial({"w": jnp.ones((2, width))}, optimizer) for width in (2, 3))
    training.save(tmp_path / "state.npz", small)
    with pytest.raises(InputError, match="the state of another model"):
        training.restore(tmp_path / "state.npz", large)


@pytest.mark.parametrize(
    ("option", "value"), [("--steps", "0"), ("--look-steps", "-1"), ("--every", "0"), ("--seed", "-1")]
)
def test_counts_are_checked_before_anything_is_done(option, value, tmp_path, capsys):
    assert train_tiny.main(["--out", str(tmp_path / "run"), option, value]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {option}: got {value}, expected ")
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


class Killed(Batches):
    """Batches of a run that is killed in its last step."""

    def __call__(self, step):
        if step == self.look_steps + self.steps - 1:
            raise KeyboardInterrupt
        return super().__call__(step)


def test_a_killed_run_goes_on_to_the_same_weights_and_log(tmp_path, packed, samples):
    sizes = {"seed": 0, "look_steps": 2, "steps": 2, "rows": 2, "questions": 3}

    def run(name, kind):
        args = argparse.Namespace(out=tmp_path / name, rate=1e-3, every=2, **sizes)
        return train_tiny.train(args, kind(packed, image_labels(samples), Mover(packed.shown), **sizes), packed)

    whole = run("whole", Batches)
    with pytest.raises(KeyboardInterrupt):
        run("killed", Killed)
    resumed = run("killed", Batches)
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("whole", "killed")]
    steps_and_losses = [[(line["step"], line["loss"]) for line in map(json.loads, log)] for log in logs]
    assert [step for step, _ in steps_and_losses[0]] == [2, 4]
    assert steps_and_losses[0] == steps_and_losses[1]
