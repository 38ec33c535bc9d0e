"""An lmmjax checkpoint: a directory that describes itself, written layer by layer and visible only whole.

config.json     the Hugging Face config, verbatim
lmmjax.json     format number, versions, the dtypes stored, and the plan of a compressed model or null
params/         the weights (Orbax)
tokenizer.json, chat template, image preprocessor ...: verbatim
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

import lmmjax
from kernels.weights import Matrix, Table
from lmmjax import files, weights
from lmmjax.config import LlavaConfig, from_hf
from lmmjax.errors import InputError
from lmmjax.llava import Params
from lmmjax.plan import Plan
from lmmjax.versions import installed

FORMAT = 2
"""1 is of plain leaves alone; 2 may hold matrices without their zeros."""
PROCESSOR_FILES = (
    "tokenizer.json tokenizer.model tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json "
    "merges.txt chat_template.jinja chat_template.json processor_config.json preprocessor_config.json "
    "generation_config.json LICENSE"
).split()
"""What travels with the weights unchanged, where it exists."""

EMBEDDED = Path(lmmjax.__file__).parent / "models" / "tiny"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model in memory, or its outline. `plan` says how it was compressed; None for a dense one."""

    path: Path
    config: LlavaConfig
    params: Params
    plan: Plan | None


@contextlib.contextmanager
def writer(
    path: Path,
    config: bytes,
    carried: Iterable[Path],
    plan: Plan | None = None,
    beside: Mapping[str, bytes] | None = None,
) -> Iterator[weights.Writer]:
    """Yields the Writer of a new checkpoint, which appears as `path` when the block ends well.

    `config` is the text of config.json, `carried` the files to be copied verbatim, `beside` other files by name; it is
    read at the end.

    Raises:
        InputError: `path` exists or cannot be written.
    """
    with files.atomic_directory(path) as temporary:
        leaves = weights.Writer(temporary / "params")
        yield leaves
        leaves.finish()
        (temporary / "config.json").write_bytes(config)
        for file in carried:
            shutil.copyfile(file, temporary / file.name)
        about = {**_about(leaves.dtypes, plan, temporary), "weights": _sizes(temporary)}
        (temporary / "lmmjax.json").write_text(json.dumps(about, indent=1))
        for name, content in (beside or {}).items():
            (temporary / name).write_bytes(content)


def load(path: str | Path, dtype: str | None = None) -> Checkpoint:
    """Returns the checkpoint at `path`, its weights on the default device.

    `dtype` None means as stored; on a CPU float32, since XLA computes bfloat16 there ten times slower.

    Raises:
        InputError: not a checkpoint, half of one, or one of a newer format.
    """
    path = Path(path)
    config, plan = described(path)
    params = weights.read_tree(path / "params", dtype or own_dtype(), jax.devices()[0])
    return Checkpoint(path, config, params, plan)


def outline(path: str | Path, dtype: str | None = None) -> Checkpoint:
    """Returns what `load` would, with shapes and dtypes in the place of the weights, of which none is read."""
    path = Path(path)
    config, plan = described(path)
    cast = dtype or own_dtype()
    leaves = weights.leaves(path / "params").items()
    params = {name: _cast(leaf, cast) for name, leaf in leaves}
    return Checkpoint(path, config, unflatten_dict(params, sep="."), plan)


def save(path: str | Path, params: Params, *, like: Path, plan: Plan | None) -> None:
    """Writes a whole new checkpoint with the config and the processor's files of the checkpoint `like`.

    A leaf goes back to the dtype that `like` stores it in wherever that loses nothing, so a model that was only
    pruned does not grow by the float32 in which a CPU holds it.

    Raises:
        InputError: `path` exists, or `like` is no checkpoint.
    """
    describe(like)
    stored = weights.leaves(like / "params")
    with writer(Path(path), (like / "config.json").read_bytes(), carried_files(like), plan) as leaves:
        for name, leaf in flatten_dict(params, sep=".").items():
            leaves.add(name, leaf if isinstance(leaf, Matrix) else _narrowed(np.asarray(leaf), stored.get(name)))


def describe(path: Path) -> Mapping[str, Any]:
    """Returns what lmmjax.json says about a checkpoint.

    Raises:
        InputError: not a checkpoint, half of one, or one of a newer format.
    """
    if not (path / "lmmjax.json").exists():
        raise InputError(f"{path} is no lmmjax checkpoint (no lmmjax.json); make one: python -m convert.hf SRC {path}")
    about = files.read_json(path / "lmmjax.json")
    if type(about.get("format")) is not int or not 1 <= about["format"] <= FORMAT:  # a bool is an int, too
        raise InputError(
            f"{path}: checkpoint format {about.get('format')!r}, this lmmjax reads up to {FORMAT}; update lmmjax"
        )
    if _sizes(path) != about.get("weights"):
        raise InputError(f"{path} is no whole checkpoint: files of params/ are missing or cut short; convert it again")
    if "plan" not in about:
        raise InputError(f"{path / 'lmmjax.json'}: no plan in it; expected one, or null; convert it again")
    return about


def described(path: Path) -> tuple[LlavaConfig, Plan | None]:
    """Returns the config of a whole checkpoint, and the plan of a compressed one; no weight is read.

    Raises:
        InputError: as `load`.
    """
    about = describe(path)
    config = from_hf(files.read_json(path / "config.json"))
    return config, None if about["plan"] is None else Plan.from_json(json.dumps(about["plan"])).check(config.text)


def require_dense(path: Path, plan: Plan | None) -> None:
    """Raises InputError for a checkpoint that has a plan, or packed weights, where the dense model is needed."""
    if plan is not None or weights.is_packed(path / "params"):
        raise InputError(f"--model: {path} is compressed already; give the dense checkpoint it was made from")


def resolve(model: str | None) -> Path:
    """Returns the checkpoint directory that `--model` names; None means the embedded model.

    The embedded model is an ordinary Hugging Face checkpoint, converted once into the user's cache by the same
    command as any other.

    Raises:
        InputError: no such directory, or one that has to be converted first; the message gives the command.
    """
    if model is None:
        return _converted_once(EMBEDDED)
    path = Path(model)
    if not path.is_dir():
        raise InputError(f"--model: there is no directory {model}; expected an lmmjax checkpoint")
    if not (path / "lmmjax.json").exists() and (path / "config.json").exists():
        target = f"{path.name}-lmmjax"
        raise InputError(
            f"--model: {model} is a Hugging Face checkpoint; convert it first: python -m convert.hf {model} {target}, "
            f"then give --model {target}"
        )
    return path


def run_convert(command: str, *arguments: Path) -> str | None:
    """Runs `python -m convert.COMMAND` in a process of its own; returns its last word if it failed.

    A process, because lmmjax does not import convert: the arrow points the other way.
    """
    root = Path(lmmjax.__file__).parents[1]
    path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    line = [sys.executable, "-m", f"convert.{command}", *map(str, arguments)]
    done = subprocess.run(line, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    return (done.stderr.strip().splitlines() or ["no message"])[-1] if done.returncode else None


def cache_dir() -> Path:
    """Returns the user's cache directory: $LMMJAX_CACHE, else $XDG_CACHE_HOME/lmmjax, else ~/.cache/lmmjax."""
    if own := os.environ.get("LMMJAX_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lmmjax"


def carried_files(directory: Path) -> list[Path]:
    """Returns the tokenizer's, chat template's and preprocessor's files that the directory has."""
    return [directory / name for name in PROCESSOR_FILES if (directory / name).is_file()]


def _converted_once(source: Path) -> Path:
    content = hashlib.sha256(str(FORMAT).encode())
    for file in sorted(source.iterdir()):
        content.update(file.name.encode() + file.read_bytes())
    target = cache_dir() / "models" / f"{source.name}-{content.hexdigest()[:16]}"
    if _is_copy(source, target):
        return target
    shutil.rmtree(target, ignore_errors=True)  # a damaged one: the user never made it and cannot mend it
    print(f"converting the embedded model into {target} (once)", file=sys.stderr)
    reason = run_convert("hf", source, target)
    if not target.exists():  # it may also exist because another process was faster
        raise InputError(f"--model: the embedded model was not converted ({reason})")
    return target


def _is_copy(source: Path, target: Path) -> bool:
    """Returns whether `target` is a whole checkpoint that carries the files of `source`."""
    try:
        describe(target)
        carried = [source / "config.json", *carried_files(source)]
        return all((target / file.name).read_bytes() == file.read_bytes() for file in carried)
    except (InputError, OSError):
        return False


def own_dtype() -> str | None:
    """Returns the dtype that weights are cast to where none is asked for; None leaves them as stored."""
    return "float32" if jax.default_backend() == "cpu" else None


def _about(dtypes: Iterable[str], plan: Plan | None, path: Path) -> dict[str, Any]:
    return {
        "format": 2 if weights.is_packed(path / "params") else 1,
        "versions": {name: installed(name) or "not installed" for name in ("lmmjax", "jax", "orbax-checkpoint")},
        "dtypes": sorted(dtypes),
        "plan": plan and json.loads(plan.to_json()),
    }


def _sizes(path: Path) -> dict[str, int]:
    entries = sorted((path / "params").rglob("*"))
    return {str(entry.relative_to(path)): entry.stat().st_size for entry in entries if entry.is_file()}


def _cast(leaf: Any, dtype: str | None) -> Any:
    """Returns the shape of a leaf that is cast when it is loaded; a packed matrix is not, but what a table gives is."""
    if isinstance(leaf, Table):
        return leaf.replace(dtype=dtype or leaf.dtype)
    return leaf if isinstance(leaf, Matrix) else jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype)


def _narrowed(leaf: np.ndarray, stored: Any) -> np.ndarray:
    """Returns the leaf in the dtype of a stored one if that keeps every value, else as it is."""
    if stored is None or leaf.dtype == stored.dtype:
        return leaf
    narrow = leaf.astype(stored.dtype)
    return narrow if np.array_equal(narrow.astype(leaf.dtype), leaf) else leaf
