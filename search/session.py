"""One run of the search command: prepare, search, keep the best, compare it on the report set, and say so."""

import argparse
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from optuna.trial import FrozenTrial
from tqdm import tqdm

from lmmjax import cache_flags, checkpoint, runtime
from lmmjax.config import TextConfig, from_hf
from lmmjax.data import located
from lmmjax.errors import InputError
from lmmjax.files import read_json
from search import allocated, output, problem, report, storage, study, warm
from search.problem import Problem
from search.settings import Settings, default_out, effort
from search.space import Candidate

JOURNAL = "study.journal"


def run(args: argparse.Namespace) -> int:
    """Returns 0 after a finished search, whether new or of an earlier run, and 130 after one that Ctrl-C ended."""
    runtime.prepare()
    out = args.out or default_out(args.model, args.budget)
    args, settings = read_settings(args)
    asked = settings.record | {"report_samples": args.report_samples, "storage": _storage_name(args.storage)}
    with output.only_one(out):
        if output.is_finished(out, asked, args.trials):
            print(f"{out} holds this search, finished; give more --trials to go on, or another --out\n")
            return output.show(out)
        where = args.storage or str(out / JOURNAL)
        with storage.only_one(where):
            interrupted = _search_and_compare(args, out, where, settings, asked)
    return output.show(out) or (130 if interrupted else 0)


def read_settings(args: argparse.Namespace) -> tuple[argparse.Namespace, Settings]:
    """Returns the arguments and the settings with all that was left open filled in from the model, paths absolute."""
    path = checkpoint.resolve(args.model)
    config = from_hf(read_json(path / "config.json"))
    args = fill_in(args, config.text)
    settings = Settings(
        model=str(path.resolve()) if args.model else checkpoint.EMBEDDED.name,
        budget=args.budget,
        kv_budget=args.budget if args.kv_budget is None else args.kv_budget,
        context=config.text.context if args.context is None else args.context,
        data=located(args.data),
        sensitivity=args.sensitivity and str(Path(args.sensitivity).resolve()),
        form=cache_flags.read(args, window=args.window),
        **{name: getattr(args, name) for name in Settings.__dataclass_fields__ if name not in _FILLED_IN},
    )
    allocated.read(settings.allocations)
    settings.space(config)  # a budget that cannot be met is found before anything is loaded
    for name, least in (("trials", 1), ("report_samples", 1), ("batch", 1)):
        if getattr(args, name) < least:
            raise InputError(f"--{name.replace('_', '-')}: got {getattr(args, name)}, expected at least {least}")
    return args, settings


_FILLED_IN = ("model", "budget", "kv_budget", "context", "data", "sensitivity", "form")


def fill_in(args: argparse.Namespace, text: TextConfig) -> argparse.Namespace:
    """Returns the arguments with the numbers that were left open as the model's size has them; says which on stderr."""
    default = effort(text.prunable)._asdict()
    left_open = {name: number for name, number in default.items() if getattr(args, name) is None}
    if left_open:
        said = ", ".join(f"--{name.replace('_', '-')} {number}" for name, number in left_open.items())
        print(f"{text.prunable / 1e6:.1f} million prunable weights: {said}", file=sys.stderr)
    return argparse.Namespace(**{**vars(args), **left_open})


def best_candidate(trials: Sequence[FrozenTrial]) -> Candidate:
    """Returns the allocation of the best trial; of equally good ones, that nearer to the dense model."""
    best = min(trials, key=lambda trial: (study.value(trial), trial.user_attrs["kl"]))
    return Candidate(*(np.array(best.user_attrs[name], np.int32) for name in Candidate._fields))


def _search_and_compare(
    args: argparse.Namespace, out: Path, where: str, settings: Settings, asked: Mapping[str, Any]
) -> bool:
    """Writes everything into OUT, the model before the comparison; returns whether Ctrl-C ended the search early."""
    began = time.monotonic()
    print(f"preparing {settings.model}: images, statistics, ranks, the dense predictions", file=sys.stderr)
    model = checkpoint.load(checkpoint.resolve(args.model))
    warmed = _warm_starts(settings, model)
    chosen = problem.prepare(settings, model, args.report_samples, args.batch)
    prepared = time.monotonic()
    known = {"fingerprint": problem.fingerprint(chosen), **({"starts": warm.digest(*warmed)} if warmed else {})}
    record = study.Record(storage.open_storage(where), {**settings.record, **known})
    more = allocated.starts(chosen, allocated.read(settings.allocations))
    interrupted = _search(chosen, record, args.trials, [*more, *warmed])
    searched = time.monotonic()
    best = best_candidate(record.trials)
    output.write_model(out, chosen, best)
    compared = list(tqdm(chosen.compared(best), desc="comparing on the report set", unit="plan"))
    facts = {
        "settings": dict(asked),
        "command": storage.without_password(_python("search.tpe", *args.words)),
        "try": _try_it(out, chosen),
        "seconds": {
            "preparation": prepared - began,
            "search": searched - prepared,
            "comparison": time.monotonic() - searched,
        },
    }
    report.write(out, report.assemble(chosen, record.trials, best, compared, facts))
    return interrupted


def _warm_starts(settings: Settings, model: checkpoint.Checkpoint) -> list[Candidate]:
    """Returns the starts that --sensitivity asks for, if it is given: looked at before anything is computed."""
    if settings.sensitivity is None:
        return []
    measured = warm.load(Path(settings.sensitivity), settings, model.params, model.config.text.layers)
    return warm.starts(measured, settings.space(model.config))


def _search(chosen: Problem, record: study.Record, trials: int, more: Sequence[Candidate]) -> bool:
    """Runs the trials that are missing, with a bar on stderr; returns whether Ctrl-C ended it early.

    The first trials are the uniform candidates and then those of `more`.
    """
    space = chosen.space
    done = record.trials
    best = min(map(study.value, done), default=float("inf"))
    proposals = study.run(
        record,
        space.distributions,
        chosen.outcome,
        trials=trials,
        starts=[space.encode(candidate) for candidate in (*space.uniform(), *more)],
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


def _storage_name(where: str | None) -> str:
    """Returns what the report calls the storage: enough to tell two apart, and no password."""
    if where is None:
        return JOURNAL
    return storage.without_password(where) if "://" in where else str(Path(where).resolve())


def _try_it(out: Path, chosen: Problem) -> str:
    sample = chosen.sets.report[0]
    arguments = ["--model", str(out / "checkpoint"), "--image", str(sample.image), "--prompt", sample.question]
    return _python("lmmjax.generate", *arguments)


def _python(module: str, *arguments: str) -> str:
    """Returns the command line that runs a module by this very interpreter, from this directory."""
    python = Path(sys.executable)
    if python.is_relative_to(Path.cwd()):
        python = python.relative_to(Path.cwd())
    return shlex.join([str(python), "-m", module, *arguments])
