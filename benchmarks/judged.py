"""What benchmarks of quality have in common: what they judge by, and figures that are kept one by one."""

import argparse
import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from benchmarks import machine
from lmmjax import checkpoint, perplexity
from lmmjax.checkpoint import Checkpoint
from lmmjax.errors import InputError
from lmmjax.files import read_json, write_atomic
from lmmjax.perplexity import Window
from lmmjax.prompt import Processor

One = TypeVar("One")


def add(parser: argparse.ArgumentParser, samples: int, windows: int) -> None:
    """Adds the flags that say of which model, and by how many questions and which text it is judged."""
    add = parser.add_argument
    add("--model", metavar="DIR", help="dense lmmjax checkpoint (default: the embedded model)")
    add(
        "--text", type=Path, nargs="+", default=[], metavar="FILE|DIR", help="plain text for perplexity: *.txt of a DIR"
    )
    add("--samples", type=int, default=samples, help="questions judged by (default: %(default)s)")
    add("--windows", type=int, default=windows, help="windows of text judged by (default: %(default)s)")
    add("--context", type=int, default=512, help="tokens a window (default: %(default)s)")
    add("--stride", type=int, default=512, help="tokens from one window to the next (default: %(default)s)")
    add("--batch", type=int, default=16)


def dense(args: argparse.Namespace) -> Checkpoint:
    """Returns the model that is compressed in every way; raises InputError for one that is compressed already."""
    path = checkpoint.resolve(args.model)
    checkpoint.require_dense(path, checkpoint.described(path)[1])
    return checkpoint.load(path)


def text(args: argparse.Namespace) -> dict[str, Any] | None:
    """Returns what a file of figures says of the text; None: there was none."""
    if not args.text:
        return None
    named = {name: getattr(args, name) for name in ("windows", "context", "stride")}
    return {"files": [file.name for file in files(args.text)], **named}


def found_in(path: Path, settings: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """Returns the figures that an earlier run of the same settings has left."""
    if not path.exists():
        return []
    known = read_json(path)
    if known["settings"] != settings:
        raise InputError(f"{path} holds figures of other settings ({known['settings']}): give another --name, or them")
    return known[key]


def measure(
    path: Path,
    settings: dict[str, Any],
    key: str,
    found: list[dict[str, Any]],
    missing: Iterable[One],
    figures: Callable[[One], dict[str, Any]],
    line: Callable[[dict[str, Any]], str],
) -> None:
    """Measures what is missing, one after the other; the file is written anew with each, and says all of `found`."""
    for one in tqdm(list(missing), unit=key.removesuffix("s")):
        began = time.monotonic()
        found.append({**figures(one), "seconds": round(time.monotonic() - began, 1)})
        write_atomic(path, json.dumps({"about": machine.facts(), "settings": settings, key: found}, indent=1))
        tqdm.write(line(found[-1]))


def files(given: Sequence[Path]) -> list[Path]:
    """Returns the files, those of a directory in order of their names."""
    return [file for path in given for file in (sorted(path.glob("*.txt")) if path.is_dir() else [path])]


def windows(model: Checkpoint, args: argparse.Namespace) -> list[Window]:
    """Returns windows spread evenly over all of the text's."""
    if not args.text:
        return []
    documents = perplexity.read(Processor.load(model.path, model.config), files(args.text))
    found = perplexity.windows(documents, args.context, args.stride)
    return [found[i] for i in np.unique(np.linspace(0, len(found) - 1, args.windows).round().astype(int))]


def name_of(model: str | None) -> str:
    """Returns what a model's results are filed under."""
    return Path(model).resolve().name if model else checkpoint.EMBEDDED.name
