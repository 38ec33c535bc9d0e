"""Evaluate a model on local files: python -m lmmjax.evaluate --task easy-vqa --out DIR.

Answers are greedy and batched, and are those that each question gets alone. Run again after an interruption, it
goes on where it stopped. Formats and figures: docs/evaluate.md.
"""

import argparse
import hashlib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmmjax.data import EASY_VQA
from lmmjax.errors import InputError, exit_code
from lmmjax.tasks import SCORERS, questions
from lmmjax.tasks.questions import IMAGES, Question

if TYPE_CHECKING:
    from lmmjax.checkpoint import Checkpoint
    from lmmjax.contender import Asked, Contender, Outcome
    from lmmjax.plan import Plan
    from lmmjax.prompt import Processor

EMBEDDED = "tiny"
"""What the embedded model is called."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, 2 after bad input, 130 after Ctrl-C (what was computed is kept then)."""
    words = sys.argv[1:] if argv is None else argv
    args = _parser().parse_args(words)
    args.words = list(words)
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Evaluates, writes answers and results into OUT, and prints the table."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        os.environ[name] = "1"
    # Imported here, for they take seconds, and `--help` and a mistyped flag need none of them.
    from lmmjax import checkpoint, contender, files, runtime
    from lmmjax.journal import Journal
    from lmmjax.prompt import Processor

    runtime.prepare()
    _check(args)
    own = _questions(args)
    truths = SCORERS[args.scorer].truths(own, args.annotations) if args.scorer else []
    stored = checkpoint.load(checkpoint.resolve(args.model))
    _require_sight(args, own, stored)
    contenders = _contenders(args, stored)
    processor = Processor.load(stored.path, stored.config)
    asked, digest = _asked(args, own, processor)
    settings = {**_settings(args, asked, contenders), "asked": digest}
    with files.alone(args.out, args.out / ".lock", "--out"):
        record = Journal(args.out / "journal.jsonl", settings)
        outcomes = {one.name: contender.run(one, processor, asked, record) for one in contenders}
        print(_written(args, settings, own, truths, outcomes))
    return 0


def _written(
    args: argparse.Namespace,
    settings: dict[str, Any],
    own: Sequence[Question],
    truths: Sequence[Any],
    outcomes: "Mapping[str, Outcome]",
) -> str:
    """Returns the table of the outcomes, once answers and results are written."""
    from lmmjax import machine, scoreboard
    from lmmjax.tasks.sheet import perplexity

    sheets = {}
    for name, outcome in outcomes.items():
        sheets[name] = [SCORERS[args.scorer].judge(own, truths, outcome.texts)] if args.scorer else []
        if outcome.likelihood is not None:
            sheets[name].append(perplexity(outcome.likelihood.nll, outcome.likelihood.tokens))
        if own:
            file = args.out / ("answers.jsonl" if name == "model" else f"{name}.jsonl")
            scoreboard.write_answers(file, settings["model"], own, outcome.texts)
    found = scoreboard.figures(sheets)
    scored = {"scorer": args.scorer, "annotations": [str(path) for path in args.annotations]}
    results = {
        "about": machine.facts("lmmjax.evaluate", args.words),
        "settings": settings | scored,
        "questions": len(own),
        "figures": found,
        "models": {name: {**outcome.size, **outcome.speed} for name, outcome in outcomes.items()},
    }
    scoreboard.write_results(args.out / "results.json", results)
    return scoreboard.table(found, outcomes)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lmmjax.evaluate", description=(__doc__ or "").split("\n", 2)[2])
    add = parser.add_argument
    add("--model", metavar="DIR", help="an lmmjax checkpoint; default: the embedded model")
    add("--task", nargs="+", default=[], metavar="FILE", help="easy-vqa, or files of questions in LLaVA's JSONL")
    add("--scorer", choices=SCORERS, help="how answers are counted; default: exact for easy-vqa, else not at all")
    add("--annotations", nargs="+", type=Path, default=[], metavar="FILE", help="what is right, if the scorer needs it")
    add("--image-folder", type=Path, metavar="DIR", help="where the images are; default: beside the file of questions")
    add("--images", choices=IMAGES, default="own", help="controls: another question's image, or none (asked blindly)")
    add("--limit", type=int, metavar="N", help="the first N questions only")
    add("--max-tokens", type=int, metavar="N", help="of an answer; default: 16 for easy-vqa, else 128")
    add("--batch", type=int, default=16, metavar="N", help="questions answered at once (default: %(default)s)")
    add("--text", nargs="+", type=Path, default=[], metavar="FILE", help="text files: perplexity, each file on its own")
    add("--context", type=int, metavar="N", help="tokens a window of text (default: 1024 or the model's)")
    add("--stride", type=int, metavar="N", help="tokens from window to window (default: half of the context)")
    add("--plan", type=Path, metavar="F", help="a plan.json to compress the model by")
    add("--baseline", nargs="?", const="", metavar="DIR", help="also the dense model: the same, or another checkpoint")
    add("--seed", type=int, default=0, metavar="N", help="of the shuffled images (default: %(default)s)")
    add("--out", type=Path, required=True, metavar="DIR", help="where everything is written")
    return parser


def _check(args: argparse.Namespace) -> None:
    if not args.task and not args.text:
        raise InputError("--task, --text: got neither; expected easy-vqa, files of questions, or files of text")
    for flag, got, least in (
        ("--limit", args.limit, 1),
        ("--batch", args.batch, 1),
        ("--max-tokens", args.max_tokens, 1),
        ("--context", args.context, 2),
        ("--stride", args.stride, 1),
        ("--seed", args.seed, 0),
    ):
        if got is not None and got < least:
            raise InputError(f"{flag}: got {got}, expected at least {least}")
    if EASY_VQA in args.task and len(args.task) > 1:
        raise InputError(f"--task: got {EASY_VQA} and files; expected one or the other")
    if args.scorer and not args.task:
        raise InputError("--scorer: given without --task; perplexity needs none")
    args.scorer = args.scorer or ("exact" if args.task == [EASY_VQA] else None)
    if args.annotations and not args.scorer:
        raise InputError(f"--annotations: given without --scorer; expected one of {', '.join(SCORERS)}")


def _questions(args: argparse.Namespace) -> list[Question]:
    if not args.task:
        return []
    if args.task == [EASY_VQA]:
        return questions.easy_vqa()[: args.limit]
    return questions.read([Path(name) for name in args.task], args.image_folder)[: args.limit]


def _require_sight(args: argparse.Namespace, own: Sequence[Question], stored: "Checkpoint") -> None:
    """Raises InputError where questions show images to a model that has no vision tower."""
    if stored.config.sees or args.images == "none":
        return
    shown = sum(question.image is not None for question in own)
    if shown:
        raise InputError(
            f"--task: {stored.path} has no vision tower and reads text alone, but {shown} of {len(own)} questions show"
            " an image; give a LLaVA, ask blindly by --images none, or evaluate --text"
        )


def _contenders(args: argparse.Namespace, stored: "Checkpoint") -> "list[Contender]":
    from lmmjax import answer, checkpoint, weights
    from lmmjax.contender import Contender
    from lmmjax.plan import Plan

    plan = Plan.load(args.plan).check(stored.config.text) if args.plan else stored.plan
    found = [Contender("model", stored, plan, lambda: answer.compress(stored, plan))]
    if args.baseline is None:
        return found
    dense = checkpoint.load(checkpoint.resolve(args.baseline)) if args.baseline else stored
    if dense.plan is not None and dense.plan.prunes:
        raise InputError(f"--baseline: {dense.path} is pruned; give the directory of the dense checkpoint it came from")
    if weights.matrices(dense.params):
        raise InputError(f"--baseline: {dense.path} is packed; give the directory of the dense checkpoint it came from")
    if dense is stored and plan is None:
        raise InputError("--baseline: the model is dense itself; give --plan, or --baseline DIR to compare with")
    if dense.config != stored.config:
        raise InputError(f"--baseline: {dense.path} is another model than {stored.path}; expected the same config.json")
    return [*found, Contender("baseline", dense, None, lambda: answer.Model(dense.config, dense.params, None))]


def _asked(args: argparse.Namespace, own: Sequence[Question], processor: "Processor") -> "tuple[Asked, str]":
    """Returns what every contender is given, and a digest of it."""
    from lmmjax import answers, perplexity
    from lmmjax.contender import Asked

    pairs = [(question.text, question.image) for question in questions.shown(own, args.images, args.seed)]
    limit = args.max_tokens or (16 if args.task == [EASY_VQA] else 128)
    context = args.context or min(1024, processor.config.text.context)
    stride = args.stride or max(1, context // 2)
    windows = perplexity.windows(perplexity.read(processor, args.text), context, stride) if args.text else []
    asked = Asked(answers.prompts(processor, pairs), limit, args.batch, windows, context)
    digest = hashlib.sha256(repr([(text, image and image.name) for text, image in pairs]).encode())
    digest.update(repr([(window.tokens, window.first) for window in windows]).encode())
    return asked, digest.hexdigest()[:16]


def _settings(args: argparse.Namespace, asked: "Asked", contenders: "Sequence[Contender]") -> dict[str, Any]:
    """Returns what decides the answers; how they are scored does not, and is done anew each time."""
    from lmmjax import weights

    def told(plan: "Plan | None") -> str | None:
        return None if plan is None else hashlib.sha256(plan.to_json().encode()).hexdigest()[:16]

    return {
        "model": Path(args.model).resolve().name if args.model else EMBEDDED,
        "weights": {one.name: weights.digest(one.stored.params).hexdigest()[:16] for one in contenders},
        "plan": {one.name: told(one.plan) for one in contenders},
        "task": args.task,
        "images": args.images,
        "seed": args.seed,
        "limit": args.limit,
        "max_tokens": asked.max_tokens,
        "batch": asked.batch,
        "text": [str(path) for path in args.text],
        "context": asked.context,
        "stride": args.stride,
    }


if __name__ == "__main__":
    sys.exit(main())
