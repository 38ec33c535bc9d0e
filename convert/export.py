"""lmmjax -> Hugging Face: python -m convert.export [--packed] DST HF_DIR."""

import argparse
import sys
from pathlib import Path

from convert import SHARD_BYTES
from lmmjax.errors import exit_code


def export(source: Path, target: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes the lmmjax checkpoint `source` as a Hugging Face directory `target`, about a layer in memory.

    Packed weights become dense again: floats as they were, codes times their scales in the dtype of the embeddings.

    Raises:
        InputError: `source` is no whole checkpoint, or `target` exists.
    """
    # Imported here, for they take seconds, and need the right `kernels`: `exit_code` looks first.
    from convert.unpacking import DenseReader
    from convert.writing import write
    from lmmjax import checkpoint, files

    checkpoint.describe(source)
    reader = DenseReader(source / "params")
    config = files.read_json(source / "config.json")
    carried = [source / "config.json", *checkpoint.carried_files(source)]
    write(target, config, carried, reader.leaves, reader.read, shard_bytes)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m convert.export", description="Write an lmmjax checkpoint as an ordinary Hugging Face one."
    )
    parser.add_argument("source", metavar="DST", type=Path, help="an lmmjax checkpoint")
    parser.add_argument("target", metavar="HF_DIR", type=Path, help="the directory to be made")
    parser.add_argument(
        "--packed", action="store_true", help="safetensors of packed weights as they are (see docs/weights.md)"
    )
    args = parser.parse_args(argv)

    def command() -> int:
        if args.packed:
            from convert.packed import export_packed

            export_packed(args.source, args.target)
        else:
            export(args.source, args.target)
        return 0

    return exit_code(command)


if __name__ == "__main__":
    sys.exit(main())
