"""What a finished smol is worth: easy-VQA beside its controls, and perplexity beside the decoder's as it came."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from examples.smol import batches
from examples.smol.learning import Frozen, Objective
from examples.vqa import measure
from examples.vqa.packing import Pack, answer_shares, images_of, pack
from lmmjax import checkpoint, llava, perplexity
from lmmjax.checkpoint import Checkpoint
from lmmjax.data import EASY_VQA, load
from lmmjax.prompt import Processor

QUESTIONS, ROWS, CONTEXT = 10, 8, 1024
"""Questions a sequence, sequences a batch, and tokens a window of text."""


def report(finished: Path, base: Checkpoint, texts: Sequence[Path], seed: int, windows: int = 24) -> dict:
    """Returns {"easy-vqa": shares of right answers, "perplexity": of the finished model and of `base`}."""
    model = checkpoint.load(finished)
    processor = Processor.load(model.path, model.config)
    parts = spread(perplexity.windows(perplexity.read(processor, texts), CONTEXT, CONTEXT), windows)
    values = {name: _perplexity(each, parts) for name, each in (("finished", model), ("base", base))}
    text = {"windows": len(parts), "context": CONTEXT, **values, "ratio": values["finished"] / values["base"]}
    return {"easy-vqa": _answered(model, processor, seed), "perplexity": text}


def judge(model: Checkpoint, frozen: Frozen, data: Pack, questions: int) -> Callable[[Any], measure.Judge]:
    """Returns what makes, of a projector and adapters, the judge of whole answers about the images of `data`."""
    right = jax.jit(Objective(model.config, len(data.prefix), questions).right)

    def with_trained(trained: Any) -> measure.Judge:
        def whole(images: np.ndarray, chosen: np.ndarray) -> np.ndarray:
            found = right(trained, frozen, batches.rows(data, images, chosen))
            return np.all(np.asarray(found).reshape(*chosen.shape, -1), axis=-1)

        return whole

    return with_trained


def features_of(model: Checkpoint, processor: Processor, images: Sequence[Path]) -> Float[np.ndarray, "i p f"]:
    """Returns the tower's features of all images."""
    see = jax.jit(lambda pixels: llava.see(model.config, model.params, pixels))
    parts = tqdm(range(0, len(images), 32), desc="images", file=sys.stderr)
    return np.concatenate([np.asarray(see(processor.pixels(images[at : at + 32]))) for at in parts])


def _answered(model: Checkpoint, processor: Processor, seed: int) -> dict:
    """Returns the shares of right answers to all test questions, and those of the controls."""
    samples = load(EASY_VQA, "test")
    shares = answer_shares(load(EASY_VQA, "train"))
    data = pack(processor, samples, shares, features_of(model, processor, images_of(samples)))
    # A finished model has its adapters merged, and a projector of plain features and embeddings.
    whole = Frozen({"text": model.params["text"]}, jnp.ones(()))
    judging = judge(model, whole, data, QUESTIONS)({"projector": model.params["projector"], "lora": {}})
    return measure.report(judging, data, samples, shares, QUESTIONS, seed, ROWS)


def spread(parts: Sequence[perplexity.Window], count: int) -> list[perplexity.Window]:
    """Returns so many windows, evenly spread over all."""
    return [parts[index] for index in np.linspace(0, len(parts) - 1, min(count, len(parts))).astype(int)]


def _perplexity(model: Checkpoint, parts: Sequence[perplexity.Window]) -> float:
    found = perplexity.score(model.config, model.params, None, parts, context=CONTEXT)
    return perplexity.gather(list(tqdm(found, desc="text", total=-(-len(parts) // 4), file=sys.stderr))).ppl
