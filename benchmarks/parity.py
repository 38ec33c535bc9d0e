"""A checkpoint beside Hugging Face torch: python -m benchmarks.parity --model DIR.

Both answer the same 20 prompts in float32, half of them about an image: logits of the whole prompt, and 32 greedy
tokens (an end of the answer does not stop them). Where tokens part, the margin between torch's two likeliest says
whether that was a tie.
"""

import argparse
import functools
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

NEW, LEAST = 32, 64
"""Tokens written, and tokens that short prompts are padded to, so that few programs are compiled."""
QUESTIONS = (
    "what color is the shape?",
    "what shape is in the image?",
    "does the image contain a circle?",
    "is there a blue shape?",
    "Describe the image in one sentence.",
)
"""Each is asked about two images."""
TEXTS = (
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Explain what a language model is.",
    "List three fruits that are red.",
    "Who wrote Romeo and Juliet?",
    "Translate 'good morning' into Spanish.",
    "What is 17 plus 25?",
    "Give me a name for a black cat.",
    "Why is the sky blue?",
    "Tell me a fact about the moon.",
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parity", description="Compare with Hugging Face torch.")
    parser.add_argument("--model", required=True, help="dense lmmjax checkpoint")
    parser.add_argument("--name", default="parity", help="of the file under benchmarks/results")
    args = parser.parse_args(argv)
    from benchmarks import machine
    from lmmjax.errors import exit_code

    def command() -> int:
        figures = compare(Path(args.model))
        print(*(f"{name}: {value}" for name, value in figures.items() if name != "prompts"), sep="\n")
        print(f"written: {machine.save(args.name, figures)}", file=sys.stderr)
        return 0

    return exit_code(command)


def compare(path: Path) -> dict[str, Any]:
    """Returns the largest relative difference of logits, how many answers are equal, and every prompt's figures."""
    from tqdm import tqdm

    from convert.export import export
    from lmmjax import checkpoint
    from lmmjax.data import EASY_VQA, load
    from lmmjax.prompt import Processor

    model = checkpoint.load(path, "float32")
    processor = Processor.load(model.path, model.config)
    images = list(dict.fromkeys(sample.image for sample in load(EASY_VQA, "test")))[: 2 * len(QUESTIONS)]
    prompts = [(question, [image]) for question, image in zip(QUESTIONS * 2, images, strict=True)]
    prompts += [(text, []) for text in TEXTS]
    with tempfile.TemporaryDirectory() as scratch:
        export(path, Path(scratch) / "hf")
        peer = _peer(Path(scratch) / "hf")
        rows = [_one(model, processor, peer, *prompt) for prompt in tqdm(prompts, unit="prompt", file=sys.stderr)]
    return {
        "largest_relative_difference": max(row["relative_difference"] for row in rows),
        "answers_equal": sum(row["parted_at"] is None for row in rows),
        "answers": len(rows),
        "new_tokens": NEW,
        "prompts": rows,
    }


def _peer(directory: Path) -> Any:
    import torch
    from transformers import LlavaForConditionalGeneration

    return LlavaForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()


def _one(model: Any, processor: Any, peer: Any, question: str, images: Sequence[Path]) -> dict[str, Any]:
    """Returns one prompt's figures. Differences are relative to the prompt's largest logit."""
    ids = processor.encode(processor.render(question, len(images)), len(images))
    pixels = processor.pixels(images)
    theirs, answer, margins = _theirs(peer, ids, pixels)
    ours, own_answer = _ours(model, ids, pixels)
    parted = next((at for at, pair in enumerate(zip(own_answer, answer, strict=True)) if pair[0] != pair[1]), None)
    return {
        "question": question,
        "images": len(images),
        "relative_difference": float(np.abs(ours - theirs).max() / np.abs(theirs).max()),
        "answer": processor.decode(answer),
        "parted_at": parted,
        "margin_there": None if parted is None else margins[parted],
    }


def _theirs(peer: Any, ids: list[int], pixels: np.ndarray) -> tuple[np.ndarray, list[int], list[float]]:
    """Returns torch's logits of the prompt, its greedy tokens, and how far the likeliest led at each."""
    import torch

    inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    if len(pixels):
        inputs["pixel_values"] = torch.from_numpy(pixels)
    with torch.inference_mode():
        logits = peer(**inputs).logits[0].numpy()
        out = peer.generate(
            **inputs,
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            do_sample=False,
            eos_token_id=None,
            output_logits=True,
            return_dict_in_generate=True,
        )
    best = [torch.topk(step[0], 2).values for step in out.logits]
    return logits, out.sequences[0, len(ids) :].tolist(), [float(two[0] - two[1]) for two in best]


def _ours(model: Any, ids: list[int], pixels: np.ndarray) -> tuple[np.ndarray, list[int]]:
    from lmmjax import engine
    from lmmjax.prompt import bucket, pad

    config, params = model.config, model.params
    images = engine.encode_images(config, params, pixels) if len(pixels) else None
    tokens, lengths = pad([ids], to=bucket(max(len(ids), LEAST)))
    state = engine.start(config, params, tokens, lengths, images, max_tokens=NEW)
    answer = engine.answers(engine.decode(config, params, state, NEW))[0]
    return np.asarray(_logits()(config, params, tokens, lengths, images))[0, : len(ids)], answer


@functools.cache
def _logits() -> Any:
    """Returns the compiled logits of whole prompts: one program a padded length."""
    import jax
    import jax.numpy as jnp

    from lmmjax import llava

    def logits(config: Any, params: Any, tokens: Any, lengths: Any, images: Any) -> Any:
        length = tokens.shape[1]
        x = llava.embed(config, params, tokens, images, lengths)
        states = llava.forward(config, params, x, jnp.arange(length)[None], jnp.tri(length, dtype=bool)[None])
        return llava.logits(config, params, states)

    return jax.jit(logits, static_argnums=0)


if __name__ == "__main__":
    sys.exit(main())
