"""The embedded model: small, an ordinary Hugging Face checkpoint, and right about images it has never seen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmmjax import checkpoint, engine, llava
from lmmjax.data import disjoint, encode, load
from lmmjax.prompt import Processor


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The model as a user gets it: converted once into the cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMMJAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        return checkpoint.load(checkpoint.resolve(None))


@pytest.fixture(scope="module")
def processor(tiny):
    return Processor.load(tiny.path, tiny.config)


def test_it_takes_at_most_12_megabytes():
    assert sum(file.stat().st_size for file in checkpoint.EMBEDDED.iterdir()) <= 12e6


def test_it_answers_unseen_questions_about_unseen_images(tiny, processor):
    (samples,) = disjoint(load("easy-vqa", "test"), (64,), seed=0)
    encoded = encode(processor, samples)
    prompts = encoded.lengths - encoded.is_answer.sum(1).astype(np.int32)
    images = engine.encode_images(tiny.config, tiny.params, jnp.asarray(encoded.pixels))
    answers = engine.generate(
        tiny.config, tiny.params, encoded.tokens, prompts, images, max_tokens=4, eos=processor.eos
    )
    right = [processor.decode(ids).strip() == sample.answer for ids, sample in zip(answers, samples, strict=True)]
    assert np.mean(right) >= 0.9
    wrong_images = engine.generate(
        tiny.config, tiny.params, encoded.tokens, prompts, images[::-1], max_tokens=4, eos=processor.eos
    )
    still = [processor.decode(ids).strip() == s.answer for ids, s in zip(wrong_images, samples, strict=True)]
    assert np.mean(still) < 0.75


def test_transformers_loads_it_whole_and_agrees(tiny, processor):
    torch = pytest.importorskip("torch", reason="parity needs torch")
    from PIL import Image
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model, info = LlavaForConditionalGeneration.from_pretrained(checkpoint.EMBEDDED, output_loading_info=True)  # pyright: ignore[reportGeneralTypeIssues]
    assert not any(info.values()), info
    (samples,) = disjoint(load("easy-vqa", "test"), (4,), seed=1)
    theirs = AutoProcessor.from_pretrained(checkpoint.EMBEDDED)
    for sample in samples:
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": sample.question}]}
        text = theirs.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)
        inputs = theirs(images=Image.open(sample.image).convert("RGB"), text=text, return_tensors="pt")
        ids = processor.encode(processor.render(sample.question, 1), 1)
        assert ids == inputs["input_ids"][0].tolist()
        with torch.no_grad():
            expected = model(**inputs).logits[0].numpy()
        pixels = jnp.asarray(processor.pixels([sample.image]))
        np.testing.assert_allclose(logits(tiny, ids, pixels), expected, atol=1e-4)


def logits(tiny, ids, pixels):
    t = len(ids)

    @jax.jit
    def compute(params, tokens, pixels):
        x = llava.embed(tiny.config, params, tokens, llava.encode_images(tiny.config, params, pixels))
        states = llava.forward(tiny.config, params, x, jnp.arange(t)[None], jnp.tri(t, dtype=bool)[None])
        return llava.logits(tiny.config, params, states)[0]

    return compute(tiny.params, jnp.array([ids]), pixels)
