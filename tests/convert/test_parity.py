"""The same numbers as transformers' torch model: logits, greedy tokens, pixels and ids."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tiny_checkpoints import IMAGE_TOKEN, write_original, write_processor

from convert import export, hf
from lmmjax import checkpoint, llava
from lmmjax.cache import empty_cache
from lmmjax.plan import CacheFormat, uniform
from lmmjax.prompt import Processor, pad

torch = pytest.importorskip("torch", reason="parity with the torch model needs torch")
import transformers  # noqa: E402

VARIANTS = {
    "gqa": {},
    "mha": {"text": {"num_key_value_heads": 4}},
    "tied": {"text": {"tie_word_embeddings": True}},
    "wide heads and another theta": {"text": {"head_dim": 16, "rope_theta": 5e5}},
    "class token kept": {"vision_feature_select_strategy": "full"},
    "several feature layers": {"vision_feature_layer": [-2, 0, 3]},
    "last layer, no projector bias": {"vision_feature_layer": -1, "multimodal_projector_bias": False},
    "mistral": {"text": {"model_type": "mistral", "sliding_window": 64}},
}
NEW = 32


def prompts(image_tokens: int) -> list[list[int]]:
    """Two prompts of unequal length: two images in the first, one in the second."""
    rng = np.random.default_rng(1)
    image = [IMAGE_TOKEN] * image_tokens
    text = rng.integers(4, 260, (3, 5)).tolist()
    return [[1, *text[0], *image, *text[1], *image, *text[2]], [1, *image, *text[0]]]


def pixels(count: int = 3) -> np.ndarray:
    return np.random.default_rng(2).standard_normal((count, 3, 28, 28)).astype(np.float32)


def theirs(directory: Path, rows: list[list[int]], images: np.ndarray) -> tuple[list[np.ndarray], list[list[int]]]:
    """Returns torch's logits of each row alone, and its greedy continuation."""
    model = transformers.LlavaForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
    logits, answers = [], []
    for row, used in zip(rows, (images[:2], images[2:]), strict=True):
        inputs = {"input_ids": torch.tensor([row]), "pixel_values": torch.from_numpy(used)}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with torch.no_grad():
            logits.append(model(**inputs).logits[0].numpy())
            out = model.generate(**inputs, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, eos_token_id=None)
        answers.append(out[0, len(row) :].tolist())
    return logits, answers


def ours(loaded: checkpoint.Checkpoint, rows: list[list[int]], images: np.ndarray):
    """Returns our logits of the padded batch, and its greedy continuation through the cache."""
    config, params = loaded.config, loaded.params
    tokens, lengths = pad(rows)
    plan = uniform(config.text, cache=CacheFormat(dtype="float32"))

    @jax.jit
    def prefill(params, images):
        x = llava.embed(config, params, jnp.asarray(tokens), llava.encode_images(config, params, images))
        cache = empty_cache(config.text, plan, len(rows), tokens.shape[1] + NEW)
        states, cache = llava.extend(config, params, cache, x, jnp.asarray(lengths))
        return cache, llava.logits(config, params, states)

    @jax.jit
    def step(params, cache, token):
        states, cache = llava.extend(
            config, params, cache, llava.embed(config, params, token[:, None], None), jnp.ones(len(rows), jnp.int32)
        )
        return cache, llava.logits(config, params, states[:, 0]).argmax(-1)

    cache, logits = prefill(params, images)
    token = logits[jnp.arange(len(rows)), lengths - 1].argmax(-1)
    answers = [token]
    for _ in range(NEW - 1):
        cache, token = step(params, cache, token)
        answers.append(token)
    return [np.asarray(logits[i, :n]) for i, n in enumerate(lengths)], np.stack(answers, 1).tolist()


def assert_parity(directory: Path, loaded: checkpoint.Checkpoint) -> None:
    rows = prompts(loaded.config.vision.image_tokens)
    want_logits, want_answers = theirs(directory, rows, pixels())
    got_logits, got_answers = ours(loaded, rows, pixels())
    for got, want in zip(got_logits, want_logits, strict=True):
        np.testing.assert_allclose(got, want[:, : got.shape[1]], atol=1e-4, rtol=0)
    assert np.ptp(want_logits[0]) > 0.5, "logits this flat would hide a difference"
    assert got_answers == want_answers


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_greedy_tokens(variant: str, hf_checkpoint, tmp_path: Path):
    source = hf_checkpoint(**VARIANTS[variant])
    hf.convert(source, tmp_path / "model")
    assert_parity(source, checkpoint.load(tmp_path / "model"))


@pytest.mark.parametrize("layout", ["saved by transformers 5", "in memory"])
def test_layouts_that_transformers_reads_too(layout: str, hf_checkpoint, tmp_path: Path):
    source = hf_checkpoint(layout=layout, dtype="bfloat16", shards=2)
    hf.convert(source, tmp_path / "model")
    assert_parity(source, checkpoint.load(tmp_path / "model"))


def test_the_original_layout_through_its_export(tmp_path: Path):
    clip = write_original(tmp_path / "source", tower_inside=False)
    hf.convert(tmp_path / "source", tmp_path / "model", vision=clip)
    export.export(tmp_path / "model", tmp_path / "back")
    assert_parity(tmp_path / "back", checkpoint.load(tmp_path / "model"))


def test_what_transformers_itself_saves(hf_checkpoint, tmp_path: Path):
    model = transformers.LlavaForConditionalGeneration.from_pretrained(hf_checkpoint())
    model.save_pretrained(tmp_path / "saved")
    write_processor(tmp_path / "saved")
    hf.convert(tmp_path / "saved", tmp_path / "model")
    assert_parity(tmp_path / "saved", checkpoint.load(tmp_path / "model"))


def test_ids_and_pixels_through_a_converted_checkpoint(hf_checkpoint, tmp_path: Path):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    source = hf_checkpoint(vision_feature_select_strategy="full")
    hf.convert(source, tmp_path / "model")
    want = transformers.LlavaProcessor(
        CLIPImageProcessorPil.from_pretrained(source),
        transformers.AutoTokenizer.from_pretrained(source),
        patch_size=14,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=1,
    )
    got = Processor.load(tmp_path / "model", checkpoint.load(tmp_path / "model").config)
    values = np.random.default_rng(0).integers(0, 256, (2, 37, 50, 3), np.uint8)
    pictures = [Image.fromarray(value) for value in values]
    text = got.render("What is this?", 2)
    expected = want(text=text, images=pictures)
    assert got.encode(text, 2) == expected["input_ids"][0]
    np.testing.assert_allclose(got.pixels(pictures), np.stack(expected["pixel_values"]), atol=1e-5)
