"""The tokenizer in a GGUF file's metadata, written as Hugging Face's files, without torch."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from lmmjax.errors import InputError, first_line

_CONTROL, _USER_DEFINED, _UNKNOWN = 3, 4, 2
_ROLES = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN_2 = _LLAMA_3.replace("{1,3}", "")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3"), _LLAMA_3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), _QWEN_2),
    "tekken": _TEKKEN,
}
_GPT_2 = (None, "default", "gpt-2")
_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell")
"""GPT-2's splitting after one at every digit."""


def write_tokenizer(metadata: Mapping[str, Any], directory: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json, generation_config.json and the chat template, where there is one.

    Raises:
        InputError: no tokenizer in the metadata, one of another kind, or one that contradicts itself.
    """
    given = {
        name.removeprefix("tokenizer.ggml."): value
        for name, value in metadata.items()
        if name.startswith("tokenizer.ggml.")
    }
    kind, tokens = given.get("model"), given.get("tokens")
    if kind not in ("gpt2", "llama") or not tokens:
        raise InputError(f"GGUF: tokenizer.ggml.model is {kind!r}; expected 'gpt2' or 'llama', and its tokens")
    if len(set(tokens)) != len(tokens):
        raise InputError("GGUF: tokenizer.ggml.tokens has a token twice; expected each once")
    roles = {new: _token(given, old) for old, new in _ROLES.items()}
    try:
        tokenizer = _byte_level(given) if kind == "gpt2" else _sentencepiece(given, roles["unk"])
        _add_special(tokenizer, given)
        _add_ends(tokenizer, given, roles, default_bos=kind == "llama")
    except InputError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exception
        raise InputError(f"GGUF: its tokenizer contradicts itself ({first_line(error)})") from error
    tokenizer.save(str(directory / "tokenizer.json"))
    named = {f"{role}_token": token for role, token in roles.items() if token is not None}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **named}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    (directory / "generation_config.json").write_text(json.dumps(_generation(given), indent=2))
    if template := metadata.get("tokenizer.chat_template"):
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")


def _token(given: Mapping[str, Any], role: str) -> str | None:
    number, tokens = given.get(f"{role}_token_id"), given["tokens"]
    if number is None or 0 <= number < len(tokens):
        return None if number is None else tokens[number]
    raise InputError(f"GGUF: tokenizer.ggml.{role}_token_id is {number}; there are {len(tokens)} tokens")


def _byte_level(given: Mapping[str, Any]) -> Tokenizer:
    """Returns a BPE tokenizer over bytes, splitting text as `tokenizer.ggml.pre` says before it merges."""
    name = given.get("pre")
    if name in _SPLITS:
        before = pre_tokenizers.Split(Regex(_SPLITS[name]), behavior="isolated")
    elif name in _DIGITS:
        before = pre_tokenizers.Digits(individual_digits=True)
    elif name not in _GPT_2:
        known = ", ".join(sorted({*_SPLITS, *_DIGITS, "gpt-2"}))
        raise InputError(f"GGUF: tokenizer.ggml.pre is {name!r}, which is not handled; expected one of {known}")
    else:
        before = None
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=name not in _SPLITS)
    # Llama 3's files rely on whole words of the vocabulary being taken before any merge.
    model = models.BPE(_vocabulary(given), _merges(given), ignore_merges=name in _SPLITS and _SPLITS[name] is _LLAMA_3)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = to_bytes if before is None else pre_tokenizers.Sequence([before, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(given: Mapping[str, Any], unknown: str | None) -> Tokenizer:
    """Returns Llama's tokenizer: merges by score over characters, bytes for what is not in the vocabulary."""
    prefixed = given.get("add_space_prefix", True)
    merges = _merges(given) if "merges" in given else _derived_merges(given["tokens"], given.get("scores"))
    tokenizer = Tokenizer(models.BPE(_vocabulary(given), merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    scheme = "first" if prefixed else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefixed else steps)
    return tokenizer


def _vocabulary(given: Mapping[str, Any]) -> dict[str, int]:
    return {token: number for number, token in enumerate(given["tokens"])}


def _merges(given: Mapping[str, Any]) -> list[tuple[str, str]]:
    merges = [tuple(merge.split(" ")) for merge in given.get("merges", ())]
    if not merges or any(len(merge) != 2 for merge in merges):
        raise InputError("GGUF: tokenizer.ggml.merges is absent, or holds other things than pairs")
    return merges


def _derived_merges(tokens: Sequence[str], scores: Sequence[float] | None) -> list[tuple[str, str]]:
    """Returns the merges that a scored vocabulary implies: every cut of a token into two others, the best first."""
    if scores is None or len(scores) != len(tokens):
        raise InputError("GGUF: tokenizer.ggml.scores is absent or of another length than the tokens")
    numbers = {token: number for number, token in enumerate(tokens)}
    found = [
        (-scores[numbers[token]], -cut, cut - len(token), token[:cut], token[cut:])
        for token in tokens
        for cut in range(1, len(token))
        if token[:cut] in numbers and token[cut:] in numbers
    ]
    return [(left, right) for *_, left, right in sorted(found, key=lambda merge: merge[:3])]


def _add_special(tokenizer: Tokenizer, given: Mapping[str, Any]) -> None:
    """Makes control tokens special and keeps the ones that users defined whole."""
    kinds = given.get("token_type") or [0] * len(given["tokens"])
    for token, kind in zip(given["tokens"], kinds, strict=True):
        if kind in (_CONTROL, _UNKNOWN):
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif kind == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, special=False, normalized=False)])


def _add_ends(tokenizer: Tokenizer, given: Mapping[str, Any], roles: Mapping[str, Any], default_bos: bool) -> None:
    """Has every text begin with bos and end with eos, if the file says so."""
    wanted = {"bos": given.get("add_bos_token", default_bos), "eos": given.get("add_eos_token", False)}
    ends = {role: roles[role] if on else None for role, on in wanted.items()}
    parts = [ends["bos"], "$A", ends["eos"]]
    used = [(token, tokenizer.token_to_id(token)) for token in ends.values() if token is not None]
    if used:
        single = [part for part in parts if part is not None]
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=used)


def _generation(given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what generation_config.json says; a chat model ends its turn with a token of its own (eot)."""
    ends = [given.get(f"{role}_token_id") for role in ("eos", "eot")]
    ends = list(dict.fromkeys(number for number in ends if number is not None))
    found = {
        "bos_token_id": given.get("bos_token_id"),
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": given.get("padding_token_id"),
    }
    return {name: value for name, value in found.items() if value is not None}
