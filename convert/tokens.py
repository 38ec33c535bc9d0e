"""The image token, made known to a tokenizer: behind its vocabulary, or in the place of a token that nothing uses."""

import json
from pathlib import Path
from typing import Any

from lmmjax.errors import InputError, first_line
from lmmjax.files import read_json

IMAGE_TOKEN = "<image>"
_NAMING_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def write_tokenizer(source: Path, scratch: Path, image_token: int | None = None) -> int:
    """Returns the image token's id, after writing what files of `source` have to change for it into `scratch`.

    With `image_token` the special token of that id becomes `<image>`, so that no embedding has to grow. Without,
    a tokenizer that knows `<image>` stays as it is, and another one gets it behind its vocabulary.

    Raises:
        InputError: the tokenizer cannot be read, or there is no unused special token of that id.
    """
    from tokenizers import AddedToken

    tokenizer = _tokenizer(source)
    known = tokenizer.token_to_id(IMAGE_TOKEN)
    if image_token is not None and known != image_token:
        _rename(source, tokenizer, image_token, scratch)
        return image_token
    if known is not None and (source / "tokenizer.json").exists():
        return known
    tokenizer.add_special_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)])
    tokenizer.save(str(scratch / "tokenizer.json"))
    number = tokenizer.token_to_id(IMAGE_TOKEN)
    _announce(source / "tokenizer_config.json", number, scratch)
    return number


def _announce(file: Path, number: int, scratch: Path) -> None:
    """Adds the image token to the list of added tokens, where a tokenizer_config.json has one: it rules then."""
    settings = read_json(file) if file.exists() else {}
    if "added_tokens_decoder" in settings:
        flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
        settings["added_tokens_decoder"][str(number)] = {"content": IMAGE_TOKEN, "special": True, **flags}
        _dump(settings, scratch / file.name)


def _rename(source: Path, tokenizer: Any, number: int, scratch: Path) -> None:
    old = tokenizer.id_to_token(number) if number >= 0 else None
    written = json.loads(tokenizer.to_str())
    added = [token for token in written["added_tokens"] if token["id"] == number and token["special"]]
    if old is None or not added:
        what = "no token" if old is None else f"{old!r}, which is text"
        raise InputError(f"--image-token-id: {number} is {what}; expected the id of an unused special token")
    if tokenizer.token_to_id(IMAGE_TOKEN) is not None:
        taken = tokenizer.token_to_id(IMAGE_TOKEN)
        raise InputError(f"--image-token-id: got {number}, but {IMAGE_TOKEN} is token {taken} already; leave it out")
    if roles := _roles(source, old, written):
        raise InputError(f"--image-token-id: {number} is {old!r}, used as {roles}; expected an unused special token")
    added[0].update(content=IMAGE_TOKEN, normalized=False)
    vocabulary = written["model"].get("vocab")
    if isinstance(vocabulary, dict) and old in vocabulary:
        vocabulary[IMAGE_TOKEN] = vocabulary.pop(old)
    _dump(written, scratch / "tokenizer.json")
    for name in _NAMING_FILES:
        if (source / name).exists():
            _dump(_replaced(read_json(source / name), old), scratch / name)


def _roles(source: Path, token: str, tokenizer: dict[str, Any]) -> str:
    """Returns for what a token is used: `eos_token` and the like, or the post-processor's; empty if for nothing."""
    settings = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (source / name).exists():
            settings.update(read_json(source / name))
    names = [
        key
        for key, value in settings.items()
        if key.endswith("_token") and token in (value, value.get("content") if isinstance(value, dict) else None)
    ]
    if token in (tokenizer.get("post_processor") or {}).get("special_tokens", {}):
        names.append("post_processor")
    return ", ".join(names)


def _replaced(value: Any, old: str) -> Any:
    """Returns JSON in which the image token has the old token's place, as a key and as a value."""
    if isinstance(value, dict):
        return {IMAGE_TOKEN if key == old else key: _replaced(inner, old) for key, inner in value.items()}
    if isinstance(value, list):
        return [_replaced(inner, old) for inner in value]
    return IMAGE_TOKEN if value == old else value


def _dump(value: Any, path: Path) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False), encoding="utf-8")


def _tokenizer(source: Path) -> Any:
    from tokenizers import Tokenizer

    if (source / "tokenizer.json").exists():
        try:
            return Tokenizer.from_file(str(source / "tokenizer.json"))
        except Exception as error:  # the library raises bare Exception for a file that it cannot read
            raise InputError(f"{source / 'tokenizer.json'}: cannot be read ({first_line(error)})") from error
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, local_files_only=True).backend_tokenizer
    except Exception as error:  # from a missing library to a file that is no tokenizer
        reason = first_line(error)
        raise InputError(
            f"{source}: cannot read its tokenizer ({reason}); pip install sentencepiece, or add tokenizer.json"
        ) from error
