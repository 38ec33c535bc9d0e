"""Trains `tiny`, a LLaVA from scratch on easy-VQA, on a CPU: python -m examples.train_tiny --out runs/tiny."""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from convert.writing import write_hf
from examples.tiny import house, learning, measure
from examples.tiny.batches import Batches, hold_out, image_labels
from examples.tiny.moving import Mover
from examples.tiny.packing import Pack, answer_shares, pack
from lmmjax.data import EASY_VQA, load
from lmmjax.errors import exit_code
from lmmjax.files import write_atomic
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
    samples, test = load(EASY_VQA, "train"), load(EASY_VQA, "test")
    files = args.out / "processor"
    house.write_all_but_weights(files, (f"USER: \n{one.question} ASSISTANT: {one.answer}" for one in samples))
    processor = Processor.load(files, learning.CONFIG)
    trained, held = hold_out(samples, HELD_OUT, args.seed)
    shares = answer_shares(trained)
    data, check = pack(processor, trained, shares), pack(processor, held, shares)
    batches = Batches(
        data,
        image_labels(trained),
        Mover(data.pixels),
        args.seed,
        args.look_steps,
        args.steps,
        args.rows,
        args.questions,
    )
    model = train(args, batches, check).params["model"]
    everything = answer_shares(samples)  # the blind baseline may learn from the held-out images too
    final = measure.report(model, pack(processor, test, everything), test, everything, args.questions, args.seed)
    write_atomic(args.out / "report.json", json.dumps(final, indent=2) + "\n")
    measure.draw(args.out / "log.jsonl", final, args.out / "training.png")
    write_hf(model, house.config_json(), args.out / "hf", sorted(files.iterdir()))
    print(json.dumps(final, indent=2))
    return 0


def train(args: argparse.Namespace, batches: Batches, check: Pack) -> learning.State:
    """Returns the state after both stages; goes on from the one saved in OUT, if any."""
    optimizer = learning.make_optimizer(args.rate, args.look_steps, args.steps)
    losses = {"look": learning.looking_loss, "answer": learning.answering_loss}
    steps = {stage: learning.make_step(optimizer, loss) for stage, loss in losses.items()}
    state = learning.restore(args.out / "state.npz", learning.initial(args.seed, optimizer))
    first, total = int(state.step), args.look_steps + args.steps
    log = _Log(args.out / "log.jsonl", first)
    bar = tqdm(range(first, total), initial=first, total=total, unit="step", file=sys.stderr)
    for index in bar:
        stage = batches.stage(index)
        state, loss = steps[stage](state, *batches(index))
        log.losses.append(float(loss))
        bar.set_postfix(stage=stage, loss=f"{log.losses[-1]:.3f}")
        done = index + 1
        saving = done % args.every == 0 or done == total
        if done % LINE == 0 or saving:
            right = {}
            if saving and stage == "answer":
                verdicts = measure.verdicts(state.params["model"], check, args.questions)
                right = measure.by_kind(verdicts, check.kinds)
            log.write(stage, done, right)
        if saving:
            learning.save(args.out / "state.npz", state)
    return state


class _Log:
    """JSON lines {stage, step, loss (mean since the line before), seconds, and now and then held-out accuracy}."""

    def __init__(self, path: Path, first: int):
        lines = path.read_text().splitlines() if path.exists() else []
        # What a killed run logged after its last save is done, and logged, again.
        self.lines = [line for line in lines if json.loads(line)["step"] <= first]
        self.path, self.losses = path, []
        self.start = time.monotonic() - (json.loads(self.lines[-1])["seconds"] if self.lines else 0)

    def write(self, stage: str, step: int, more: dict[str, float]) -> None:
        seconds = round(time.monotonic() - self.start)
        line = {"stage": stage, "step": step, "loss": round(float(np.mean(self.losses)), 4), "seconds": seconds, **more}
        self.lines.append(json.dumps(line))
        self.losses = []
        write_atomic(self.path, "\n".join(self.lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
