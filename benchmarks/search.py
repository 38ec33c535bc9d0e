"""TPE beside random search and uniform pruning: python -m benchmarks.search [--budgets 0.5 0.4] [--blocks layer]

Both searchers see the same space, the same projection onto the budget and the same number of trials. A seed
decides the calibration set, the search set and the sampler; the report set is the same for all.
"""

import argparse
import dataclasses
import itertools
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

import optuna

from benchmarks import machine
from lmmjax import checkpoint, runtime
from lmmjax.checkpoint import Checkpoint
from lmmjax.errors import exit_code
from lmmjax.likelihood import Result
from search import comparison, problem, sets, study
from search.problem import Problem
from search.session import best_candidate
from search.settings import Settings
from search.space import Candidate

SEARCHERS = {"random": study.random, "tpe": study.tpe}
HEADER = "budget  blocks     score seed  method                        search       KL   right  trials/min"


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Measures every case, prints a table and writes benchmarks/results/NAME.json."""
    runtime.prepare()
    model = checkpoint.load(checkpoint.resolve(args.model))
    rows: list[dict[str, Any]] = []
    print(HEADER)
    for budget, blocks, score in itertools.product(args.budgets, args.blocks, args.scores):
        for seed in range(args.seeds):
            settings = Settings(
                model=model.path.name,
                budget=budget,
                kv_budget=args.kv_budget or budget,
                context=model.config.text.context,
                blocks=blocks,
                score=score,
                search_samples=args.search_samples,
                seed=seed,
            )
            for row in _measure(settings, model, args):
                rows.append(row)
                print(_line(row), flush=True)
    summary = _summary(rows)
    path = machine.save(args.name, {"rows": rows, "summary": summary})
    for line in summary:
        print(f"budget {line['budget']:g} {line['blocks']} {line['score']} {line['method']}: {_words(line)}")
    print(path)
    return 0


def _measure(settings: Settings, model: Checkpoint, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yields a row for every baseline, then one for every searcher, of one seed."""
    chosen = problem.prepare(settings, model, args.report_samples, args.batch)
    sizes = (settings.calibration_samples, settings.search_samples, args.report_samples)
    shared = sets.take(settings.data, *sizes, seed=0).report
    chosen = dataclasses.replace(chosen, sets=dataclasses.replace(chosen.sets, report=shared))
    judge = chosen.report_evaluator()
    case = {name: getattr(settings, name) for name in ("budget", "kv_budget", "blocks", "score", "seed")}
    uniform = {}
    for contender in _uniform(chosen):
        result = judge(contender.candidate, contender.ranks)
        uniform[contender.name] = result
        on_search = chosen.measure(chosen.evaluator(contender.candidate, contender.ranks))
        yield {**case, "method": contender.name, "value": on_search, **_quality(result, None)}
    for name in SEARCHERS:
        best, facts = search(chosen, SEARCHERS[name], args.trials)
        yield {**case, "method": name, **facts, **_quality(judge(best), uniform["uniform wanda"])}


def _uniform(chosen: Problem) -> Iterator[comparison.Contender]:
    """Yields the uniform baselines; what is searched plays no part in them."""
    nothing = chosen.space.uniform()[0]
    for contender in comparison.contenders(
        chosen.space, chosen.rank, nothing, chosen.settings.score, chosen.evaluator, chosen.measure
    ):
        if contender.name.startswith("uniform"):
            yield contender


def search(chosen: Problem, propose: study.Proposal, trials: int) -> tuple[Candidate, dict[str, Any]]:
    """Returns the best candidate of a search that is kept nowhere, and how it went."""
    record = study.Record(optuna.storages.InMemoryStorage(), {})
    starts = [chosen.space.encode(candidate) for candidate in chosen.space.uniform()]
    began = time.monotonic()
    proposals = study.run(
        record,
        chosen.space.distributions,
        chosen.outcome,
        trials=trials,
        starts=starts,
        propose=propose,
        seed=chosen.settings.seed,
    )
    values = [study.value(trial) for trial in proposals]
    minutes = (time.monotonic() - began) / 60
    facts = {"value": min(values), "trials": trials, "trials_per_minute": trials / minutes}
    return best_candidate(record.trials), {**facts, "best_so_far": list(itertools.accumulate(values, min))}


def _quality(result: Result, rival: Result | None) -> dict[str, Any]:
    quality = {"kl": result.kl, "nll": result.nll, "accuracy": result.accuracy, "by_kind": result.by_kind}
    if rival is not None:
        quality["over_uniform_wanda"] = comparison.differences({"searched": result, "uniform wanda": rival})[
            "uniform wanda"
        ]
    return quality


def _summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns mean and spread over the seeds of every case and method."""
    cases = dict.fromkeys((row["budget"], row["blocks"], row["score"], row["method"]) for row in rows)
    lines = []
    for case in cases:
        line: dict[str, Any] = dict(zip(("budget", "blocks", "score", "method"), case, strict=True))
        of_case = [row for row in rows if all(row[name] == value for name, value in line.items())]
        for key in ("accuracy", "kl", "trials_per_minute"):
            if key in of_case[0]:
                values = [row[key] for row in of_case]
                deviation = statistics.stdev(values) if len(values) > 1 else None
                line[key] = {"mean": statistics.mean(values), "deviation": deviation, "seeds": len(values)}
        lines.append(line)
    return lines


def _words(line: dict[str, Any]) -> str:
    def spread(key: str, scale: float, digits: int) -> str:
        mean, deviation = line[key]["mean"], line[key]["deviation"]
        more = "" if deviation is None else f" +- {scale * deviation:.{digits}f}"
        return f"{scale * mean:.{digits}f}{more}"

    speed = f", {line['trials_per_minute']['mean']:.0f} trials/min" if "trials_per_minute" in line else ""
    return f"{spread('accuracy', 100, 2)}% right, KL {spread('kl', 1, 4)}{speed}"


def _line(row: dict[str, Any]) -> str:
    case = f"{row['budget']:>6g} {row['blocks']:>7} {row['score']:>9} {row['seed']:>4}"
    speed = f"{row['trials_per_minute']:>12.0f}" if "trials_per_minute" in row else ""
    return f"{case}  {row['method']:<27}{row['value']:>9.4f}{row['kl']:>9.4f}{100 * row['accuracy']:>7.1f}%{speed}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.search", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--model", metavar="DIR", help="dense lmmjax checkpoint (default: the embedded model)")
    add("--budgets", type=float, nargs="+", default=[0.5], metavar="B")
    add("--kv-budget", type=float, metavar="F", help="default: the budget")
    add("--blocks", nargs="+", default=["layer"], metavar="N|layer|linear")
    add("--scores", nargs="+", default=["lognorm"], metavar="SCORE")
    add("--trials", type=int, default=100)
    add("--seeds", type=int, default=3)
    add("--search-samples", type=int, default=256)
    add("--report-samples", type=int, default=1000)
    add("--batch", type=int, default=16)
    add("--name", default="search", help="of the file in benchmarks/results")
    return parser


if __name__ == "__main__":
    sys.exit(main())
