"""A LLaVA from separate parts: python -m convert.assemble --vision DIR --text DIR_OR_GGUF --projector FILE OUT."""

import argparse
import dataclasses
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from convert import DTYPES
from lmmjax import files
from lmmjax.errors import InputError, exit_code

if TYPE_CHECKING:
    from convert.material import Material
    from convert.parts import Decoder
    from convert.tower import Tower


def assemble(
    vision: Path,
    text: Path,
    target: Path | None = None,
    *,
    hf: Path | None = None,
    projector: Path | None = None,
    random_projector: int | None = None,
    lora: Path | None = None,
    dtype: str | None = None,
    image_size: int | None = None,
    image_token_id: int | None = None,
    chat_template: Path | None = None,
    own_chat_template: bool = False,
    feature_layer: int | None = None,
) -> None:
    """Writes a LLaVA of separate parts as the lmmjax checkpoint `target`, as the Hugging Face one `hf`, or both.

    vision: a CLIP directory, whole or its vision model alone. text: a Llama directory, a .gguf file, or an original
    LLaVA directory, which holds its projector (and keeps its own tower, if it has one). projector: a .safetensors
    or .bin file, LLaVA's names or the original's. random_projector: the seed of one to be trained, in its place.
    lora: a PEFT adapter's directory or file. dtype: of all weights; by default each keeps its own, what was
    quantized being float32. image_size: pixels, to which the tower's position embeddings are resampled.
    image_token_id: a special token that nothing uses, to become `<image>`. chat_template: a Jinja file, by default
    LLaVA 1.5's (or an original's own); with own_chat_template the text part's stays. feature_layer: of the tower,
    by default -2.

    Tensors are read, merged and written one after the other.

    Raises:
        InputError: a part cannot be used or they do not fit; nothing is left behind then.
    """
    # Imported here, for they take seconds, and need the right `kernels`: `exit_code` looks first.
    from convert.lora import Merged
    from convert.parts import join
    from convert.projector import open_projector
    from convert.tower import resized

    _require_free(target, hf)
    with tempfile.TemporaryDirectory() as name:
        scratch, unpacked = Path(name) / "made", Path(name) / "text"
        scratch.mkdir()
        unpacked.mkdir()
        tower, decoder, template = _open(Path(vision), Path(text), unpacked)
        if image_size is not None:
            tower = resized(tower, image_size)
        if feature_layer is not None:
            decoder = dataclasses.replace(decoder, feature_layer=feature_layer)
        material = join(
            tower,
            decoder,
            open_projector(tower, decoder, projector, random_projector),
            scratch,
            image_token=image_token_id,
            chat_template=_template(decoder, template, chat_template, own_chat_template),
        )
        if lora is not None:
            material = dataclasses.replace(material, weights=Merged(material.weights, Path(lora), dtype))
        _write(material, target, hf, dtype)


def _require_free(target: Path | None, hf: Path | None) -> None:
    if target is None and hf is None:
        raise InputError("OUT: got none; expected a directory to be made, here or with --hf")
    if target is not None and hf is not None:
        ours, theirs = Path(target).resolve(), Path(hf).resolve()
        if ours.is_relative_to(theirs) or theirs.is_relative_to(ours):
            raise InputError(f"--hf: got {hf}, expected a directory that is neither OUT nor inside it nor around it")
    for path in (target, hf):
        if path is not None:
            files.refuse_existing(path)


def _write(material: "Material", target: Path | None, hf: Path | None, dtype: str | None) -> None:
    """Writes one checkpoint or both; the first does not stay without the second."""
    from convert.material import store, store_hf

    if target is not None:
        store(material, target, dtype)
    try:
        if hf is not None:
            store_hf(material, hf, dtype)
    except BaseException:
        if target is not None:
            shutil.rmtree(target)
        raise


def _open(vision: Path, text: Path, unpacked: Path) -> "tuple[Tower, Decoder, str | None]":
    """Returns the tower, the decoder, and the chat template that belongs to it as part of a LLaVA."""
    from convert import original
    from convert.parts import CHAT_TEMPLATE, Decoder
    from convert.source import open_source
    from convert.tower import open_tower

    if not vision.is_dir():
        raise InputError(f"--vision: there is no directory {vision}; expected one with a CLIP model")
    if text.is_file():
        return open_tower(vision), _open_gguf(text, unpacked), CHAT_TEMPLATE
    if not text.is_dir():
        raise InputError(f"--text: there is no {text}; expected a directory or a .gguf file")
    raw = files.read_json(text / "config.json")
    if original.is_original(raw):
        return *original.parts(text, raw, vision), original.chat_template(text)
    if raw.get("model_type") not in ("llama", "mistral"):
        raise InputError(f"--text: {text} is a {raw.get('model_type')!r}; expected a llama, a mistral or a .gguf file")
    return open_tower(vision), Decoder(raw, open_source(text), text), CHAT_TEMPLATE


def _open_gguf(file: Path, unpacked: Path) -> "Decoder":
    from convert.gguf import Gguf
    from convert.gguf_tokenizer import write_tokenizer
    from convert.parts import Decoder

    weights = Gguf(file)
    write_tokenizer(weights.metadata, unpacked)
    return Decoder(weights.settings, weights, unpacked)


def _template(decoder: "Decoder", default: str | None, file: Path | None, own: bool) -> str | None:
    """Returns the chat template to be written; None keeps the decoder's own."""
    if own and file is not None:
        raise InputError("--chat-template: got a file beside --own-chat-template; expected one of the two")
    if own:
        if not _has_template(decoder.directory):
            raise InputError("--own-chat-template: the text part has none; give --chat-template FILE")
        return None
    if file is None:
        return default
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"--chat-template: {file} cannot be read as text ({error})") from error


def _has_template(directory: Path) -> bool:
    from lmmjax.files import read_json

    if any((directory / name).exists() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    settings = directory / "tokenizer_config.json"
    return settings.exists() and bool(read_json(settings).get("chat_template"))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m convert.assemble", description="Make a LLaVA of a CLIP tower, a Llama and a projector."
    )
    parser.add_argument("target", metavar="OUT", type=Path, nargs="?", help="the lmmjax checkpoint to be made")
    parser.add_argument("--hf", metavar="DIR", type=Path, help="also, or without OUT only: a Hugging Face checkpoint")
    parser.add_argument("--vision", metavar="DIR", type=Path, required=True, help="a CLIP directory")
    text = "a Llama directory, a GGUF file, or an original LLaVA directory, which holds its projector"
    parser.add_argument("--text", metavar="DIR_OR_GGUF", type=Path, required=True, help=text)
    parser.add_argument("--projector", metavar="FILE", type=Path, help=".safetensors, or .bin such as mm_projector.bin")
    parser.add_argument("--random-projector", metavar="SEED", type=int, help="in its place, one that is to be trained")
    parser.add_argument("--lora", metavar="PATH", type=Path, help="merge this PEFT adapter, a directory or its file")
    parser.add_argument("--dtype", choices=DTYPES, help="of all weights; default: each keeps its own")
    size = "pixels; the tower's position embeddings are resampled (bicubic)"
    parser.add_argument("--image-size", metavar="N", type=int, help=size)
    token = "a special token that nothing uses, to become <image>; default: a new one behind the vocabulary"
    parser.add_argument("--image-token-id", metavar="I", type=int, help=token)
    parser.add_argument("--chat-template", metavar="FILE", type=Path, help="default: LLaVA 1.5's")
    parser.add_argument("--own-chat-template", action="store_true", help="keep the text part's chat template")
    parser.add_argument("--feature-layer", metavar="L", type=int, help="of the tower; default: -2, or the original's")
    args = vars(parser.parse_args(argv))

    def command() -> int:
        assemble(args.pop("vision"), args.pop("text"), args.pop("target"), **args)
        return 0

    return exit_code(command)


if __name__ == "__main__":
    sys.exit(main())
