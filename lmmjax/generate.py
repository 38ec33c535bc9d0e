"""Answer a question about images: python -m lmmjax.generate."""

import argparse
import dataclasses
import io
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lmmjax.errors import InputError, exit_code
from lmmjax.machine import size

if TYPE_CHECKING:
    from lmmjax.answer import Answer, Request
    from lmmjax.prompt import Picture, Processor

EMBEDDED_QUESTION = "what shape is in the image?"
"""What the embedded model is asked about an image that comes without a question."""


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Returns 0 after a whole answer and 130 after Ctrl-C, the text so far on stdout and the statistics on stderr.

    Of a dry run it returns 1 if what the question takes does not fit, else 0, with the bytes on stdout.
    """
    # Imported here, for they take seconds, and `--help` and a mistyped flag need none of them.
    from lmmjax import answer, checkpoint, dryrun, runtime
    from lmmjax.plan import Plan
    from lmmjax.prompt import Processor

    runtime.prepare()
    _check(args)
    wish = dryrun.wish(args)
    answer.check_backend(args.backend)
    path = checkpoint.resolve(args.model)
    config = answer.read_config(path)
    if args.image and not config.sees:
        raise InputError(f"--image: {path} has no vision tower and reads text alone; leave it out, or give a LLaVA")
    plan = Plan.load(args.plan).check(config.text) if args.plan else None
    if args.dry_run and not dryrun.has_question(args):
        return dryrun.run(wish, path, plan, args.json)
    processor = Processor.load(path, config)
    request = _request(args, processor)
    if args.dry_run:
        return dryrun.run(dataclasses.replace(wish, prompt=request.ids), path, plan, args.json)
    model = answer.load(path, plan)
    result = answer.answer(model, processor, request, _ignore if args.json else _show)
    if args.json:
        print(json.dumps({**dataclasses.asdict(result), "tokens_per_second": result.tokens_per_second}))
    else:
        print(flush=True)
        print(summary(result), file=sys.stderr)
    return 130 if result.stopped == "interrupt" else 0


def summary(result: "Answer") -> str:
    """Returns what the answer took, for people to read."""
    from kernels.cpu import library

    vision = f"{result.images} x image {result.vision_ms:.1f} ms, " if result.images else ""
    speed = f": {result.tokens_per_second:.1f} tokens/s" if result.tokens_per_second else ""
    phases = "; ".join(f"{phase} {', '.join(names)}" for phase, names in result.attention.items())
    products = "".join(f"; products: {count} x {name}" for name, count in result.products.items())
    unpacked = any(name.startswith("unpacked") for name in result.products)
    if unpacked and result.device == "cpu" and (reason := library.missing()):
        products += f" ({reason})"
    lines = [
        f"prompt   {result.prompt_tokens} tokens: {vision}prefill {result.prefill_ms:.1f} ms",
        f"answer   {result.tokens} tokens ({result.stopped}){speed}",
        f"compile  {result.compile_ms:.0f} ms, not counted above; the programs are kept for the next run",
        f"weights  {size(result.weights_bytes)}{products}",
        f"cache    {size(result.kv_bytes)} for {result.kv_capacity} tokens (dense: {size(result.kv_dense_bytes)})",
        f"backend  of attention: {phases}; on {result.device}",
    ]
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lmmjax.generate",
        description="Answer a question about images. Without arguments: a demonstration on the embedded model."
        " The text goes to stdout, what it took to stderr. Ctrl-C ends the answer (exit code 130).",
    )
    add = parser.add_argument
    add("--model", metavar="DIR", help="an lmmjax checkpoint (see convert.hf); default: the embedded model")
    add("--image", metavar="F", action="append", default=[], help="a file, or - for stdin; may be repeated")
    add("--prompt", metavar="T", help="the question; <image> in it says where the images belong")
    add("--system", metavar="T", help="a system text, if the chat template has a place for it")
    add("--plan", metavar="F", type=Path, help="a plan.json to compress the model by")
    add("--max-tokens", "--max-new-tokens", metavar="N", type=int, default=256, help="default: 256")
    add("--temperature", metavar="X", type=float, default=0.0, help="default: 0, the likeliest token each time")
    add("--top-p", metavar="X", type=float, default=1.0, help="draw from the likeliest tokens that make up this share")
    add("--top-k", metavar="N", type=int, default=0, help="draw from this many likeliest tokens; 0: from all")
    add("--seed", metavar="N", type=int, default=0, help="of the draws; default: 0")
    add("--raw", action="store_true", help="take the prompt as it stands, without the chat template")
    add("--json", action="store_true", help="print one line with text, tokens, timings and bytes instead")
    add("--backend", metavar="NAME", help="of attention in decode steps; an explicit choice never falls back")
    add("--show-prompt", action="store_true", help="print the prompt as the model sees it, on stderr")
    dry = parser.add_argument_group("to know before: bytes of the weights and the KV cache").add_argument
    dry("--dry-run", action="store_true", help="print them and load nothing; exit code 1 if --memory is too little")
    dry("--memory", metavar="SIZE", help="what there is, such as 8GiB or 500MB: do they fit? Exit code 0 if they do")
    dry("--batch", metavar="N", help="rows of the cache; default: 1")
    dry("--context", metavar="N", help="tokens in a row; default: what --prompt needs, else the model's context")
    return parser


def _check(args: argparse.Namespace) -> None:
    rules = [
        ("--max-tokens", args.max_tokens, 1 <= args.max_tokens < 2**31, "1 to 2^31 - 1"),
        ("--temperature", args.temperature, 0 <= args.temperature < float("inf"), "0 or more"),
        ("--top-p", args.top_p, 0 < args.top_p <= 1, "above 0 and at most 1"),
        ("--top-k", args.top_k, 0 <= args.top_k < 2**31, "0 to 2^31 - 1"),
        ("--seed", args.seed, 0 <= args.seed < 2**32, "0 to 2^32 - 1"),
    ]
    for flag, got, good, expected in rules:
        if not good:
            raise InputError(f"{flag}: got {got}, expected {expected}")


def _request(args: argparse.Namespace, processor: "Processor") -> "Request":
    from lmmjax.answer import Request
    from lmmjax.sample import Sampling

    question, images = _question(args)
    text = question if args.raw else processor.render(question, len(images), args.system)
    if args.show_prompt:
        print(text, file=sys.stderr)
    return Request(
        ids=processor.encode(text, len(images)),
        pixels=processor.pixels(images),
        max_tokens=args.max_tokens,
        sampling=Sampling(args.temperature, args.top_k, args.top_p),
        seed=args.seed,
        backend=args.backend,
    )


def _question(args: argparse.Namespace) -> tuple[str, list["Picture"]]:
    """Returns what is asked about which images."""
    images = [_stdin_image() if name == "-" else name for name in args.image]
    if args.prompt is not None and not args.prompt.strip():
        raise InputError("--prompt: got an empty text, expected a question")
    if args.prompt is not None and (images or args.model or args.raw):
        return args.prompt, images
    if args.model:
        raise InputError("--prompt: none given; expected a question")
    return _demonstration(args.prompt, images)


def _demonstration(prompt: str | None, images: list["Picture"]) -> tuple[str, list["Picture"]]:
    """Returns what the embedded model is asked where the user left something open, and says so on stderr."""
    from lmmjax import data

    sample = data.load(data.EASY_VQA, "test")[0]
    question = prompt or (EMBEDDED_QUESTION if images else sample.question)
    if not images:
        print(f"no --image: the model sees {sample.image}", file=sys.stderr)
    if prompt is None:
        right = "" if images else f" (right: {sample.answer})"
        print(f"no --prompt: the model is asked {question!r}{right}", file=sys.stderr)
    return question, images or [sample.image]


def _stdin_image() -> "Picture":
    from lmmjax.prompt import open_image

    return open_image(io.BytesIO(sys.stdin.buffer.read()), "from stdin")


def _show(piece: str) -> None:
    print(piece, end="", flush=True)


def _ignore(piece: str) -> None:
    """Shows nothing: the text is part of the one line at the end."""


if __name__ == "__main__":
    sys.exit(main())
