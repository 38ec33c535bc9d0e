"""python -m search.tpe --budget 0.5: the search as a command.

Finds how much of every layer to prune and how many bits its keys and values take, under an exact budget, and
writes the plan, the compressed checkpoint and a report into OUT. Run again, it goes on where it stopped.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from optuna.trial import FrozenTrial
from tqdm import tqdm

from lmmjax import checkpoint, runtime
from lmmjax.checkpoint import read_json
from lmmjax.config import from_hf
from lmmjax.errors import InputError, exit_code
from lmmjax.prune import SCORES
from search import output, problem, report, study
from search.objective import OBJECTIVES
from search.problem import Problem
from search.settings import Settings, default_out
from search.space import Candidate
from search.storage import open_storage


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, 2 after bad input, 130 after Ctrl-C (the best so far is written then too)."""
    args = parser().parse_args(argv)
    args.command = shlex.join(["python", "-m", "search.tpe", *(sys.argv[1:] if argv is None else argv)])
    return exit_code(lambda: run(args))


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m search.tpe", description=(__doc__ or "").split("\n", 2)[2])
    default = Settings("", 0.5, 0.5, 1)
    add = parser.add_argument
    add("--budget", type=float, required=True, metavar="B", help="share of the prunable weights to keep, exactly")
    add("--kv-budget", type=float, metavar="F", help="share of the dense KV cache's bytes to use at most (default: B)")
    add("--model", metavar="DIR", help="dense lmmjax checkpoint (default: the embedded model, tiny)")
    add("--data", default=default.data, metavar="SPEC", help="easy-vqa, or a JSONL file of questions about images")
    add("--trials", type=int, default=100, metavar="N", help="finished trials to end with (default: %(default)s)")
    add("--blocks", default=default.blocks, metavar="N|layer|linear", help="which linears share a sparsity")
    add("--box", type=float, default=default.box, help="how far a wished sparsity may lie from uniform")
    add("--objective", default=default.objective, choices=OBJECTIVES, help="what is made small (accuracy: its lack)")
    add("--score", default=default.score, choices=SCORES, help="which weights go first")
    add("--context", type=int, metavar="N", help="tokens at which the cache is measured (default: the model's context)")
    add("--group", type=int, default=default.group, metavar="N", help="tokens or channels that share a scale")
    add("--window", type=int, default=default.window, metavar="N", help="latest tokens kept exact")
    add("--calibration-samples", type=int, default=default.calibration_samples, metavar="N")
    add("--calibration-tokens", default=default.calibration_tokens, choices=("all", "text"))
    add("--search-samples", type=int, default=default.search_samples, metavar="N")
    add("--report-samples", type=int, default=1000, metavar="N")
    add("--batch", type=int, default=16, metavar="N", help="samples evaluated at once (default: %(default)s)")
    add("--storage", metavar="PATH|URL", help="Optuna's journal or database (default: OUT/study.journal)")
    add("--seed", type=int, default=default.seed)
    add("--out", type=Path, metavar="DIR", help="where everything is written (default: runs/<model>-<budget>)")
    return parser


def run(args: argparse.Namespace) -> int:
    """Prepares, searches, compares on the report set, writes, and prints the summary."""
    runtime.prepare()
    out = args.out or default_out(args.model, args.budget)
    settings = _settings(args)
    with output.only_one(out):
        if output.is_finished(out, settings, args.trials):
            print(f"{out} holds this search, finished; give more --trials to go on, or another --out\n")
            return output.show(out)
        began = time.monotonic()
        print(f"preparing {settings.model}: images, statistics, ranks, the dense predictions", file=sys.stderr)
        model = checkpoint.load(checkpoint.resolve(args.model))
        chosen = problem.prepare(settings, model, args.report_samples, args.batch)
        prepared = time.monotonic()
        storage = open_storage(args.storage or str(out / "study.journal"))
        record = study.Record(storage, {**vars(settings), "fingerprint": problem.fingerprint(chosen)})
        interrupted = _search(chosen, record, args.trials)
        searched = time.monotonic()
        best = best_candidate(record.trials)
        compared = list(tqdm(chosen.compared(best), desc="comparing on the report set", unit="plan"))
        extra = {
            "command": args.command,
            "try": _try_it(out, chosen),
            "seconds": {
                "preparation": prepared - began,
                "search": searched - prepared,
                "comparison": time.monotonic() - searched,
            },
        }
        output.write_model(out, chosen, best)
        report.write(out, report.assemble(chosen, record.trials, best, compared, extra))
    return output.show(out) or (130 if interrupted else 0)


def best_candidate(trials: Sequence[FrozenTrial]) -> Candidate:
    """Returns the allocation of the best trial; of equally good ones, that nearer to the dense model."""
    best = min(trials, key=lambda trial: (study.value(trial), trial.user_attrs["kl"]))
    return Candidate(*(np.array(best.user_attrs[name], np.int32) for name in Candidate._fields))


def _settings(args: argparse.Namespace) -> Settings:
    """Returns the settings with everything that was left open filled in from the model."""
    path = checkpoint.resolve(args.model)
    config = from_hf(read_json(path / "config.json"))
    settings = Settings(
        model=str(path.resolve()) if args.model else checkpoint.EMBEDDED.name,
        budget=args.budget,
        kv_budget=args.budget if args.kv_budget is None else args.kv_budget,
        context=config.text.context if args.context is None else args.context,
        **{name: getattr(args, name) for name in Settings.__dataclass_fields__ if name not in _FILLED_IN},
    )
    settings.space(config.text)  # a budget that cannot be met is found before anything is loaded
    for name, least in (("trials", 1), ("report_samples", 1), ("batch", 1)):
        if getattr(args, name) < least:
            raise InputError(f"--{name.replace('_', '-')}: got {getattr(args, name)}, expected at least {least}")
    return settings


_FILLED_IN = ("model", "budget", "kv_budget", "context")


def _search(chosen: Problem, record: study.Record, trials: int) -> bool:
    """Runs the trials that are missing, with a bar on stderr; returns whether Ctrl-C ended it early."""
    space = chosen.space
    done = record.trials
    best = min(map(study.value, done), default=float("inf"))
    proposals = study.run(
        record,
        space.distributions,
        chosen.outcome,
        trials=trials,
        starts=[space.encode(candidate) for candidate in space.uniform()],
        propose=study.tpe,
        seed=chosen.settings.seed,
    )
    with study.stop_on_interrupt() as stopped, tqdm(total=trials, initial=len(done), unit="trial") as bar:
        for trial in proposals:
            best = min(best, study.value(trial))
            bar.set_postfix_str(f"best {chosen.settings.objective} {best:.4g}", refresh=False)
            bar.update()
            if stopped():
                return len(record.trials) < trials
    return False


def _try_it(out: Path, chosen: Problem) -> str:
    sample = chosen.sets.report[0]
    arguments = ["--model", str(out / "checkpoint"), "--image", str(sample.image), "--prompt", sample.question]
    return shlex.join(["python", "-m", "lmmjax.generate", *arguments])


if __name__ == "__main__":
    sys.exit(main())
