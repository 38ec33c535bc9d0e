"""Trains `tiny`, a LLaVA from scratch on easy-VQA, on a CPU: python -m examples.train_tiny --out runs/tiny."""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from convert.writing import write_hf
from examples.tiny import house, learning
from examples.tiny.batches import Batches, image_labels
from examples.tiny.moving import Mover
from examples.vqa import measure, picture, training
from examples.vqa.packing import Pack, answer_shares, hold_out, images_of, pack
from lmmjax.data import EASY_VQA, load
from lmmjax.errors import exit_code
from lmmjax.files import write_atomic
from lmmjax.llava import Params
from lmmjax.prompt import Processor

LINE = 50
"""Steps that share a line of the log."""
HELD_OUT = 200
"""Training images kept from training, to watch it by; the test images are looked at once, in the end."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.train_tiny", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="directory of the run; a run that it holds goes on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--look-steps", type=int, default=600, help="steps that train tower and projector to classify")
    parser.add_argument("--steps", type=int, default=1100, help="steps that train the whole model to answer")
    parser.add_argument("--rows", type=int, default=32, help="images a step (twice as many while looking)")
    parser.add_argument("--questions", type=int, default=6, help="questions an image")
    parser.add_argument("--rate", type=float, default=1e-3, help="peak learning rate of both stages")
    parser.add_argument("--every", type=int, default=250, help="steps between checks and saves")
    args = parser.parse_args(argv)
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Trains, writes the Hugging Face checkpoint OUT/hf, and reports on the test questions."""
    defining = ("seed", "look_steps", "steps", "rows", "questions", "rate")
    training.require_counts(vars(args))
    training.claim(args.out, {name: getattr(args, name) for name in defining})
    samples, test = load(EASY_VQA, "train"), load(EASY_VQA, "test")
    files = args.out / "processor"
    house.write_all_but_weights(files, (f"USER: \n{one.question} ASSISTANT: {one.answer}" for one in samples))
    processor = Processor.load(files, learning.CONFIG)
    trained, held = hold_out(samples, HELD_OUT, args.seed)
    shares = answer_shares(trained)
    data, check = (pack(processor, part, shares, processor.pixels(images_of(part))) for part in (trained, held))
    batches = Batches(
        data,
        image_labels(trained),
        Mover(data.shown),
        args.seed,
        args.look_steps,
        args.steps,
        args.rows,
        args.questions,
    )
    model = train(args, batches, check).params["model"]
    everything = answer_shares(samples)  # the blind baseline may learn from the held-out images too
    testing = pack(processor, test, everything, processor.pixels(images_of(test)))
    final = measure.report(judge(model, testing), testing, test, everything, args.questions, args.seed)
    write_atomic(args.out / "report.json", json.dumps(final, indent=2) + "\n")
    picture.draw(args.out / "log.jsonl", final, args.out / "training.png")
    write_hf(model, house.config_json(), args.out / "hf", sorted(files.iterdir()))
    print(json.dumps(final, indent=2))
    return 0


def train(args: argparse.Namespace, batches: Batches, check: Pack) -> training.State:
    """Returns the state after both stages; goes on from the one saved in OUT, if any."""
    optimizer = learning.make_optimizer(args.rate, args.look_steps, args.steps)
    losses = {"look": learning.looking_loss, "answer": learning.answering_loss}
    steps = {stage: training.make_step(optimizer, loss) for stage, loss in losses.items()}
    fresh = training.initial(learning.initial_params(args.seed), optimizer)

    def step(index: int, state: training.State) -> tuple:
        stage = batches.stage(index)
        return stage, *steps[stage](state, *batches(index))

    def right(stage: str, state: training.State) -> dict[str, float]:
        if stage != "answer":
            return {}
        verdicts = measure.verdicts(judge(state.params["model"], check), check, args.questions)
        return measure.by_kind(verdicts, check.kinds)

    total = args.look_steps + args.steps
    return training.run_steps(args.out, fresh, total, step, right, every=args.every, line=LINE)


def judge(params: Params, data: Pack) -> measure.Judge:
    """Returns what judges whole answers about the images of `data`."""
    return lambda images, chosen: np.asarray(learning.judge(params, data.shown[images], *data.tokens(chosen)))


if __name__ == "__main__":
    sys.exit(main())
