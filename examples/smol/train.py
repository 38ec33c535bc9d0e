"""Trains smol's projector and adapters on easy-VQA and plain text: python -m examples.smol.train."""

import argparse
import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import optax

from examples.smol import adapter, batches, build, fetch, learning, report
from examples.smol.batches import Batches, Stage
from examples.smol.learning import Frozen, Objective
from examples.vqa import measure, picture, training
from examples.vqa.packing import Pack, answer_shares, hold_out, images_of, pack
from lmmjax import checkpoint, runtime
from lmmjax.checkpoint import Checkpoint
from lmmjax.data import EASY_VQA, Sample, load
from lmmjax.errors import InputError, exit_code
from lmmjax.files import write_atomic
from lmmjax.prompt import Processor

LINE = 10
"""Steps that share a line of the log."""
HELD_OUT = 40
"""Training images kept from training, to watch it by."""
QUESTIONS = 6
"""Questions in a sequence that is judged."""
ROWS = {"align": (16, 3), "name": (16, 3), "match": (8, 6)}
"""By stage, images a step and questions an image: few questions are open."""
STAGES = tuple(ROWS)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.smol.train", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="directory of the run; a run that it holds goes on")
    parser.add_argument(
        "--base", type=Path, help="checkpoint of the same parts, untrained (default: built as OUT/base)"
    )
    parser.add_argument("--vision", metavar="DIR", help="as build.py takes it; default: downloaded")
    parser.add_argument("--text", metavar="DIR_OR_GGUF", help="likewise")
    parser.add_argument("--texts", type=Path, help="plain text files below train/ and report/ (default: downloaded)")
    parser.add_argument("--parts", type=Path, help="where downloads are kept")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, nargs=3, default=[60, 200, 240], metavar=STAGES)
    parser.add_argument("--projector-rate", type=float, default=2e-3)
    parser.add_argument("--adapter-rate", type=float, default=1e-3)
    parser.add_argument("--window", type=int, default=128, help="tokens of plain text a step")
    parser.add_argument("--every", type=int, default=40, help="steps between checks and saves")
    args = parser.parse_args(argv)
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Trains, writes OUT/adapter and the finished checkpoint OUT/checkpoint, and reports on the test questions."""
    runtime.prepare()
    defining = ("seed", "steps", "projector_rate", "adapter_rate", "window")
    training.require_counts(vars(args))
    training.claim(args.out, {name: getattr(args, name) for name in defining})
    base, (learned, reported) = prepare(args)
    model = checkpoint.load(base)
    processor = Processor.load(model.path, model.config)
    data, check, scaling = training_data(args, model, processor)
    stages = [Stage(name, steps, *ROWS[name]) for name, steps in zip(STAGES, args.steps, strict=True)]
    source = Batches(data, batches.read_text(processor, learned, args.window), args.window, stages, args.seed)
    trained = train(args, model, source, check).params
    size = learning.root_mean_square(model.params["text"]["embedding"])
    finished = args.out / "checkpoint"
    if not finished.exists():
        shutil.rmtree(args.out / "adapter", ignore_errors=True)
        adapter.write(args.out / "adapter", learning.fold(trained["projector"], *scaling, size), trained["lora"])
        build.build(finished, args.out / "adapter", vision=args.vision, text=args.text, parts=args.parts)
    final = report.report(finished, model, reported, args.seed)
    write_atomic(args.out / "report.json", json.dumps(final, indent=2) + "\n")
    picture.draw(args.out / "log.jsonl", final["easy-vqa"], args.out / "training.png")
    print(json.dumps(final, indent=2))
    return 0


def prepare(args: argparse.Namespace) -> tuple[Path, tuple[list[Path], list[Path]]]:
    """Returns the untrained checkpoint, and the texts to learn from and to report on."""
    base = args.base or args.out / "base"
    if not base.exists():
        build.build(base, None, vision=args.vision, text=args.text, parts=args.parts)
    if args.texts:
        learned, reported = args.texts / "train", args.texts / "report"
    else:
        learned, reported = fetch.texts(args.parts or checkpoint.cache_dir() / "smol")
    files = sorted(learned.glob("*.txt")), sorted(reported.glob("*.txt"))
    if not all(files):
        raise InputError(f"--texts: no .txt files in {reported if files[0] else learned}; expected train/ and report/")
    return base, files


def training_data(
    args: argparse.Namespace, model: Checkpoint, processor: Processor
) -> tuple[Pack, Pack, tuple[np.ndarray, np.ndarray]]:
    """Returns the questions to learn from, those held out, and the features' mean and deviation."""
    samples = load(EASY_VQA, "train")
    trained, held = hold_out(samples, HELD_OUT, args.seed)
    features, *scaling = normalized_features(model, processor, images_of(samples), args.out / "features.npz")
    shares = answer_shares(trained)
    data, check = (pack(processor, part, shares, select(features, samples, part)) for part in (trained, held))
    return data, check, (scaling[0], scaling[1])


def train(args: argparse.Namespace, model: Checkpoint, source: Batches, check: Pack) -> training.State:
    """Returns the state after all stages; goes on from the one saved in OUT, if any."""
    size = learning.root_mean_square(model.params["text"]["embedding"])
    frozen = Frozen({"text": model.params["text"]}, size)
    optimizer = learning.make_optimizer(
        tuple(stage.steps for stage in source.stages), args.projector_rate, args.adapter_rate
    )
    fresh = training.initial(learning.initial_params(model.config, args.seed), optimizer)
    steps = {
        stage.name: _step(stage, Objective(model.config, len(source.data.prefix), stage.questions), optimizer)
        for stage in source.stages
    }
    judging = report.judge(model, frozen, check, QUESTIONS)

    def step(index: int, state: training.State) -> tuple:
        stage = source.stage(index).name
        return stage, *steps[stage](state, frozen, *source(index))

    def right(stage: str, state: training.State) -> dict[str, float]:
        return measure.by_kind(measure.verdicts(judging(state.params), check, QUESTIONS, rows=8), check.kinds)

    return training.run_steps(args.out, fresh, source.steps, step, right, every=args.every, line=LINE)


def _step(stage: Stage, objective: Objective, optimizer: optax.GradientTransformation) -> Callable:
    loss = objective.aligning if stage.name == "align" else objective.answering
    return training.make_step(optimizer, loss)


def normalized_features(
    model: Checkpoint, processor: Processor, images: list[Path], kept: Path
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the tower's features of all images, normalized by channel, with mean and deviation; computed once.

    CLIP has channels a hundred times as large as the others, which else would rule the projector's first steps.
    """
    if not kept.exists():
        found = report.features_of(model, processor, images)
        mean, deviation = found.mean((0, 1)), found.std((0, 1))
        buffer = io.BytesIO()
        np.savez(buffer, features=((found - mean) / deviation).astype(np.float16), mean=mean, deviation=deviation)
        write_atomic(kept, buffer.getvalue())
    with np.load(kept) as stored:
        return stored["features"].astype(np.float32), stored["mean"], stored["deviation"]


def select(features: np.ndarray, samples: list[Sample], part: list[Sample]) -> np.ndarray:
    """Returns the features of the images of some samples, in their order."""
    places = {image: index for index, image in enumerate(images_of(samples))}
    return features[[places[image] for image in images_of(part)]]


if __name__ == "__main__":
    sys.exit(main())
