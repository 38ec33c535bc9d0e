"""The output directory of a search: plan.json, checkpoint/, the report, and the lock that keeps it to one process."""

import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from lmmjax import checkpoint
from lmmjax.errors import InputError
from lmmjax.files import alone, read_json, write_atomic
from search import report, study
from search.problem import Problem
from search.space import Candidate

RESULTS = ("checkpoint/lmmjax.json", "plan.json", "report.html", "report.json")


def only_one(out: Path) -> AbstractContextManager[None]:
    """Holds OUT for this process.

    Raises:
        InputError: another process holds it, or it cannot be written to.
    """
    return alone(out, out / ".lock", "--out")


def write_model(out: Path, chosen: Problem, best: Candidate) -> None:
    """Writes plan.json and the compressed checkpoint, in place of those of an earlier run.

    An earlier report goes first: it never stands beside a model that it does not describe.
    """
    plan = chosen.plan(best)
    new, old, target = out / ".checkpoint-new", out / ".checkpoint-old", out / "checkpoint"
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    checkpoint.save(new, chosen.compressed(best), like=chosen.checkpoint.path, plan=plan)
    for name in ("report.json", "report.html"):
        (out / name).unlink(missing_ok=True)
    if target.exists():
        target.rename(old)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)
    write_atomic(out / "plan.json", plan.to_json())


def is_finished(out: Path, asked: Mapping[str, Any], trials: int) -> bool:
    """Returns whether OUT holds all results of the search that is asked for, with at least so many trials."""
    if not all((out / name).exists() for name in RESULTS):
        return False
    try:
        found = read_json(out / "report.json")
    except InputError:
        return False
    return not study.compare(found.get("settings", {}), asked) and found.get("trials", 0) >= trials


def show(out: Path) -> int:
    """Prints what the report in OUT comes to, and what to do next; returns the exit code 0."""
    found = read_json(out / "report.json")
    print(f"{found['title']}, {found['trials']} trials\n\n{report.summary(found)}\n")
    print(f"report: {out / 'report.html'}\nplan:   {out / 'plan.json'}\ntry:    {found['try']}")
    return 0
