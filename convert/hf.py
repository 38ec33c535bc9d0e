"""Hugging Face -> lmmjax: python -m convert.hf SRC DST."""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from convert import DTYPES
from lmmjax import files
from lmmjax.errors import InputError, exit_code, first_line

if TYPE_CHECKING:
    from convert.material import Material


def convert(source: Path, target: Path, *, dtype: str | None = None, vision: Path | None = None) -> None:
    """Writes the lmmjax checkpoint `target` from a Hugging Face (LLaVA, Llama, Mistral) or original LLaVA directory.

    One tensor after the other is read, and at most 64 MiB and a tensor wait to be written: converting 1.55 GB
    of bfloat16 peaked at 0.87 GB, 0.36 GB of which are the libraries. Without `dtype` every tensor keeps its
    own. `vision` is the CLIP directory of an original checkpoint that does not contain its tower.

    Raises:
        InputError: the config, the weights or the target cannot be used; nothing is left behind then.
    """
    files.refuse_existing(target)
    with tempfile.TemporaryDirectory() as scratch:
        material = _gather(source, vision, Path(scratch))
        # Imported here, for it takes seconds, and needs the right `kernels`: `exit_code` looks first.
        from convert.material import store

        store(material, target, dtype)


def locate(source: str, revision: str | None = None, argument: str = "SRC") -> Path:
    """Returns the local directory of a source: itself, or a snapshot of that model on the hub (downloaded once).

    Raises:
        InputError: neither a directory nor a model that can be had.
    """
    if Path(source).is_dir():
        return Path(source)
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise InputError(f"{argument}: there is no directory {source}; expected one, or a hub id such as owner/name")
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.jinja", "tokenizer.model", "merges.txt", "LICENSE", "*.safetensors"]
    try:
        path = Path(snapshot_download(source, revision=revision, allow_patterns=wanted))
        if not any(path.glob("*.safetensors")):  # a repository that has both would else cost twice the download
            snapshot_download(source, revision=revision, allow_patterns=["*.bin"])
        return path
    except Exception as error:  # offline, unknown, gated: the hub's client has a class for each
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise InputError(
            f"{argument}: {source} is no directory here and cannot be had from the hub ({reason})"
        ) from error


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m convert.hf",
        description="Convert a checkpoint to lmmjax: Hugging Face's LLaVA, Llama or Mistral, or an original LLaVA.",
    )
    parser.add_argument("source", metavar="SRC", help="a directory, or a model on the hub: llava-hf/llava-1.5-7b-hf")
    parser.add_argument("target", metavar="DST", type=Path, help="the lmmjax checkpoint, a directory to be made")
    parser.add_argument("--dtype", choices=DTYPES, help="of all weights; default: each keeps its own")
    parser.add_argument("--vision", metavar="DIR", help="the CLIP tower of an original LLaVA without one")
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit on the hub")
    args = parser.parse_args(argv)

    def command() -> int:
        files.refuse_existing(args.target)  # before anything is downloaded
        vision = locate(args.vision, argument="--vision") if args.vision else None
        convert(locate(args.source, args.revision), args.target, dtype=args.dtype, vision=vision)
        return 0

    return exit_code(command)


def _gather(source: Path, vision: Path | None, scratch: Path) -> "Material":
    from convert import original
    from convert.material import Material
    from convert.source import open_source
    from lmmjax import checkpoint
    from lmmjax.config import from_hf

    raw = files.read_json(source / "config.json")
    if original.is_original(raw):
        return original.gather(source, raw, vision, scratch)
    config = from_hf(raw)  # before the weights are looked for, so that another architecture is called that
    if vision is not None and not config.sees:
        raise InputError(f"--vision: {source} is a decoder alone; leave it out, or see python -m convert.assemble")
    if vision is not None:
        raise InputError(f"--vision: {source} is in Hugging Face's layout and holds its own tower; leave it out")
    carried = checkpoint.carried_files(source)
    if not {"tokenizer.json", "tokenizer.model"} & {file.name for file in carried}:
        raise InputError(f"{source} has neither tokenizer.json nor tokenizer.model; add the model's tokenizer")
    return Material((source / "config.json").read_bytes(), carried, open_source(source))


if __name__ == "__main__":
    sys.exit(main())
