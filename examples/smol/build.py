"""Builds smol, a LLaVA of pretrained parts: python examples/smol/build.py."""

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__" and str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # run as a file, so that it works as typed

from lmmjax.errors import InputError, exit_code  # noqa: E402

HERE = Path(__file__).parent
ADAPTER = HERE / "adapter"
IMAGE_SIZE = 96
"""Pixels: 36 image tokens. easy-VQA's images have 64."""
IMAGE_TOKEN = 16
"""A special token of SmolLM2 that chat never uses."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python examples/smol/build.py", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/smol"), help="checkpoint to be made (%(default)s)")
    parser.add_argument("--hf", type=Path, metavar="DIR", help="the same as an ordinary Hugging Face checkpoint, too")
    parser.add_argument("--vision", metavar="DIR", help="CLIP ViT-B/16: a directory or a hub id; default: downloaded")
    parser.add_argument("--text", metavar="DIR_OR_GGUF", help="SmolLM2-135M-Instruct, likewise, or a GGUF file")
    parser.add_argument("--adapter", type=Path, default=ADAPTER, help="projector and LoRA of a training run")
    parser.add_argument("--parts", type=Path, metavar="DIR", help="where downloads are kept")
    args = parser.parse_args(argv)
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Returns 0 with the checkpoint at OUT, whether it was there or is new."""
    from lmmjax.checkpoint import describe

    if args.out.exists() and args.hf is None:
        describe(args.out)  # or an error: what is there may be anything
        print(f"{args.out} is there already; remove it to build it anew", file=sys.stderr)
        return 0
    build(args.out, args.adapter, hf=args.hf, vision=args.vision, text=args.text, parts=args.parts)
    print(f"{args.out}\n\nask it:  python -m lmmjax.generate --model {args.out}")
    print(f"fit it:  python -m search.tpe --budget 0.5 --model {args.out}")
    return 0


def build(
    target: Path,
    adapter: Path | None,
    *,
    hf: Path | None = None,
    vision: str | None = None,
    text: str | None = None,
    parts: Path | None = None,
) -> None:
    """Writes the checkpoint `target` of tower, decoder and adapter; without one its projector is random.

    Raises:
        InputError: a part cannot be had, the adapter is not there, or what is to be made is. Whatever shows
            without a download is told before it.
    """
    from convert.assemble import assemble
    from convert.hf import locate
    from examples.smol import fetch, tower
    from examples.smol.adapter import PROJECTOR
    from lmmjax.checkpoint import cache_dir
    from lmmjax.files import refuse_existing

    for path in filter(None, (target, hf)):
        refuse_existing(path)
    if adapter is not None and not (adapter / PROJECTOR).exists():
        raise InputError(f"--adapter: {adapter} has no {PROJECTOR}; give a directory that training wrote")
    kept = parts or cache_dir() / "smol"
    with tempfile.TemporaryDirectory() as scratch:
        seen = Path(scratch) / "tower" if vision is None else locate(vision, argument="--vision")
        spoken = None if text is None else _given(text)
        if vision is None:
            tower.require_onnx()
            tower.write_tower(fetch.part(fetch.TOWER, kept), seen)
        assemble(
            seen,
            spoken or fetch.part(fetch.DECODER, kept),
            target,
            hf=hf,
            projector=adapter / PROJECTOR if adapter else None,
            random_projector=None if adapter else 0,
            lora=adapter,
            image_size=IMAGE_SIZE,
            image_token_id=IMAGE_TOKEN,
            chat_template=HERE / "chat_template.jinja",
        )


def _given(text: str) -> Path:
    from convert.hf import locate

    return Path(text) if text.endswith(".gguf") or Path(text).is_file() else locate(text, argument="--text")


if __name__ == "__main__":
    sys.exit(main())
