"""Answers in batches are those that each question gets alone, and an image is read once."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lmmjax import answer, answers, engine
from lmmjax.plan import CacheFormat, LayerPlan, Plan
from lmmjax.prompt import Processor, pad

LAYERS = (LayerPlan(4, 2), LayerPlan(16, 8))
PLANS = {
    "dense": None,
    "rounded": Plan(LAYERS, cache=CacheFormat(group=4, window=4, dtype="float32")),
    "rounded later": Plan(LAYERS, cache=CacheFormat(group=4, window=4, dtype="float32", quantize_prefill=False)),
}
QUESTIONS = ["what?", "is it longer?", "where?", "why is it so?", "no image, just text?"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    paths = [folder / f"{i}.png" for i in range(3)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (28, 28, 3), dtype=np.uint8)).save(path)
    return paths


@pytest.mark.parametrize("name", PLANS)
def test_batches_answer_as_each_question_alone(name: str, checkpoint: Path, images: list[Path], monkeypatch):
    monkeypatch.setattr(answers, "IMAGES", 2)
    model = answer.load(checkpoint, PLANS[name])
    processor = Processor.load(checkpoint, model.config)
    asked = [(text, images[i]) for i in (0, 1, 2, 0) for text in QUESTIONS[: 4 - i]] + [(QUESTIONS[4], None)]
    prompts = answers.prompts(processor, asked)
    parts = answers.groups(model.plan, prompts, 3)
    seen = []
    encode = engine.encode_images
    monkeypatch.setattr(engine, "encode_images", lambda *given: seen.append(given[2].shape[0]) or encode(*given))
    got = dict(answers.answers(model, processor, prompts, parts, 8, lambda _: False))
    assert seen == [2, 2]  # three images, two at a time, the last time one twice
    texts = {index: text for batch in got.values() for index, text in batch.texts.items()}
    assert sorted(texts) == list(range(len(asked)))
    assert len(set(texts.values())) > 5
    width = max(len(prompt.ids) for prompt in prompts)
    for index, (prompt, (_, image)) in enumerate(zip(prompts, asked, strict=True)):
        features = None if image is None else encode(model.config, model.params, processor.pixels([image]))
        settings = {"max_tokens": 8, "plan": model.plan, "eos": processor.eos}
        alone = engine.generate(model.config, model.params, *pad([prompt.ids], width), features, **settings)
        assert texts[index] == processor.decode(alone[0]).strip()


def test_batches_that_are_done_are_not_computed_and_change_no_other(checkpoint: Path, images: list[Path]):
    model = answer.load(checkpoint)
    processor = Processor.load(checkpoint, model.config)
    prompts = answers.prompts(processor, [(text, image) for image in images[:2] for text in QUESTIONS[:4]])
    parts = answers.groups(model.plan, prompts, 3)
    whole = dict(answers.answers(model, processor, prompts, parts, 4, lambda _: False))
    rest = dict(answers.answers(model, processor, prompts, parts, 4, lambda number: number < 1))
    assert [*rest] == [1, 2]
    assert all(rest[number].texts == whole[number].texts for number in rest)
    assert sum(batch.read for batch in whole.values()) == sum(
        {prompt.image: prompt.shared for prompt in prompts}.values()
    ) + sum(len(prompt.ids) - prompt.shared for prompt in prompts)
    assert json.dumps([batch.ms for batch in whole.values()])
