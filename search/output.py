"""The output directory of a search: plan.json, checkpoint/, the report, and the lock that keeps it to one process."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from lmmjax import checkpoint
from lmmjax.checkpoint import read_json
from lmmjax.errors import InputError
from lmmjax.files import write_atomic
from search import report, study
from search.problem import Problem
from search.settings import Settings
from search.space import Candidate


@contextlib.contextmanager
def only_one(out: Path) -> Iterator[None]:
    """Holds OUT for this process; the kernel lets go of it however the process ends."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(out / ".lock", os.O_CREAT | os.O_RDWR)
    except OSError as error:
        raise InputError(f"--out: cannot write to {out} ({error.strerror})") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"--out: another search is writing to {out}; wait for it, or give another --out") from None
        yield
    finally:
        os.close(descriptor)


def write_model(out: Path, chosen: Problem, best: Candidate) -> None:
    """Writes plan.json and the compressed checkpoint, in place of those of an earlier run."""
    plan = chosen.plan(best)
    new, old, target = out / ".checkpoint-new", out / ".checkpoint-old", out / "checkpoint"
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    checkpoint.save(new, chosen.compressed(best), like=chosen.checkpoint.path, plan=plan)
    if target.exists():
        target.rename(old)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)
    write_atomic(out / "plan.json", plan.to_json())


def is_finished(out: Path, settings: Settings, trials: int) -> bool:
    """Returns whether OUT holds the report of this search with at least so many trials."""
    if not (out / "report.json").exists():
        return False
    found = read_json(out / "report.json")
    return not study.compare(found["settings"], vars(settings)) and found["trials"] >= trials


def show(out: Path) -> int:
    """Prints what the report in OUT comes to, and what to do next; returns the exit code 0."""
    found = read_json(out / "report.json")
    print(f"{found['title']}, {found['trials']} trials\n\n{report.summary(found)}\n")
    print(f"report: {out / 'report.html'}\nplan:   {out / 'plan.json'}\ntry:    {found['try']}")
    return 0
