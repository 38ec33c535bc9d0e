"""A GGUF file of the Llama architecture: its weights under Hugging Face's names, and its config from the metadata.

Every quantization that the `gguf` package dequantizes is read; such weights come out in float32.
Source: the format's description, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFEndian, GGUFReader, dequantize

from convert.names import Shape
from convert.source import Source
from lmmjax.errors import InputError, first_line

_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_WHOLE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_SETTINGS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
# Settings that are not read, with the values at which they say what a Llama does anyway.
_HARMLESS = {
    "rope.scaling.type": ("none",),
    "rope.scaling.factor": (0.0, 1.0),
    "rope.scale_linear": (1.0,),
    "attention.causal": (True,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "tensor_data_layout": ("Meta AI original pth",),  # the order of rows that `_in_halves` expects
}
_TYPES = {"F16": "float16", "BF16": "bfloat16"}


class _Stored(NamedTuple):
    """Where a tensor is in the file, and how it is kept."""

    name: str
    kind: GGMLQuantizationType
    shape: Shape
    offset: int
    nbytes: int


class Gguf(Source):
    """The weights of a GGUF file, and its `metadata` as a dict. A tensor is dequantized when it is read."""

    def __init__(self, file: Path):
        self.file = file
        reader = _opened(file)
        self.metadata = {name: field.contents() for name, field in reader.fields.items()}
        if (architecture := self.metadata.get("general.architecture")) != "llama":
            raise InputError(f"{file}: general.architecture is {architecture!r}; expected 'llama'")
        if self.metadata.get("split.count", 1) not in (0, 1):
            raise InputError(f"{file} is one of {self.metadata['split.count']} parts; expected one file: merge them")
        self._stored = {_hf_name(file, tensor.name): _placed(file, tensor) for tensor in reader.tensors}
        self.tensors = {
            name: (stored.shape, _TYPES.get(stored.kind.name, "float32")) for name, stored in self._stored.items()
        }
        self.settings = self._settings()

    def read(self, name: str) -> np.ndarray:
        stored, (shape, dtype) = self._stored[name], self.tensors[name]
        raw = np.fromfile(self.file, np.uint8, stored.nbytes, offset=stored.offset)
        array = dequantize(raw.reshape(*shape[:-1], -1), stored.kind).reshape(shape)
        if re.search(r"\.(q|k)_proj\.", name):
            array = _in_halves(array, self.settings["head_dim"])
        return array.astype(dtype, copy=False)

    def _settings(self) -> dict[str, Any]:
        """Returns the `text_config`."""
        given = {
            name.removeprefix("llama."): value for name, value in self.metadata.items() if name.startswith("llama.")
        }
        if absent := [f"llama.{name}" for name in _SETTINGS if name not in given]:
            raise InputError(f"{self.file}: no {', '.join(absent)} in its metadata; expected a whole model")
        settings: dict[str, Any] = {new: given.pop(old) for old, new in _SETTINGS.items()}
        heads = settings["num_attention_heads"]
        tokens = [f"{role}_token_id" for role in ("bos", "eos")]
        settings |= {
            "model_type": "llama",
            "num_key_value_heads": given.pop("attention.head_count_kv", heads),
            "rope_theta": given.pop("rope.freq_base", 10000.0),
            "head_dim": given.pop("attention.key_length", _quotient(settings["hidden_size"], heads)),
            "vocab_size": self.tensors.get("model.embed_tokens.weight", ((0,), ""))[0][0],
            "tie_word_embeddings": "lm_head.weight" not in self.tensors,
            **{name: self.metadata.get(f"tokenizer.ggml.{name}") for name in tokens},
            "pad_token_id": self.metadata.get("tokenizer.ggml.padding_token_id"),
        }
        self._require_handled(given, settings)
        tokens = len(self.metadata.get("tokenizer.ggml.tokens") or ())
        if tokens > settings["vocab_size"]:
            raise InputError(f"{self.file}: {tokens} tokens, but {settings['vocab_size']} embeddings; get it anew")
        return settings

    def _require_handled(self, rest: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        """Refuses what no line of `_settings` has read, unless it says nothing new."""
        head_dim = (settings["head_dim"],)
        implied = {
            "rope.dimension_count": head_dim,
            "attention.value_length": head_dim,
            "vocab_size": (settings["vocab_size"],),
        }
        known = {**_HARMLESS, **implied}
        problems = [f"llama.{name} = {value!r}" for name, value in rest.items() if value not in known.get(name, ())]
        per_layer = {name for name, value in settings.items() if name.startswith("num_") and not isinstance(value, int)}
        odd = {"head_dim"} if settings["head_dim"] % 2 else set()
        problems += [f"llama.{name} = {settings[name]!r}" for name in sorted(per_layer | odd)]
        if problems:
            raise InputError(f"{self.file}: {', '.join(problems)} is not handled; expected a plain Llama")


class _Reader(GGUFReader):
    """The package's reader, which says of a type of tensors that it does not know whose it is."""

    def _build_tensors(self, start_offs: int, fields: Any) -> None:
        for field in fields:
            _length, name, _dims, _shape, kind, _offset = field.parts
            if int(kind[0]) not in {known.value for known in GGMLQuantizationType}:
                raise InputError(_unreadable(bytes(name).decode(), f"type {int(kind[0])}"))
        super()._build_tensors(start_offs, fields)


def _opened(file: Path) -> GGUFReader:
    try:
        reader = _Reader(file)
    except InputError as error:
        raise InputError(f"{file}: {error}") from error
    except Exception as error:  # the reader checks little: a file cut short ends in any of NumPy's errors
        raise InputError(f"{file} cannot be read as GGUF ({first_line(error)}); download it again") from error
    if reader.endianess is not GGUFEndian.LITTLE:
        raise InputError(f"{file} is big-endian; expected a little-endian GGUF file")
    return reader


def _placed(file: Path, tensor: Any) -> _Stored:
    kind = tensor.tensor_type
    if not _is_dequantized(kind):
        raise InputError(f"{file}: {_unreadable(tensor.name, f'type {kind.name}')}")
    shape = tuple(int(size) for size in reversed(tensor.shape))
    return _Stored(tensor.name, kind, shape, int(tensor.data_offset), int(tensor.n_bytes))


def _is_dequantized(kind: GGMLQuantizationType) -> bool:
    """Returns whether the package dequantizes this type, which it says only when asked to."""
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _unreadable(name: str, kind: str) -> str:
    return f"{name} is of {kind}, which the package gguf does not dequantize; get the file in another quantization"


def _hf_name(file: Path, name: str) -> str:
    if name in _WHOLE:
        return _WHOLE[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if match is None or match[2] not in _BLOCK:
        what = "scaled rotary embeddings are" if name == "rope_freqs.weight" else "it is"
        raise InputError(f"{file}: the tensor {name} has no place in a plain Llama; {what} not handled")
    return f"model.layers.{match[1]}.{_BLOCK[match[2]]}.weight"


def _in_halves(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Returns the rows of q or k in Hugging Face's order.

    GGUF has the two numbers that are rotated together side by side; Hugging Face has all first ones of a head
    and then all second ones.
    """
    return rows.reshape(-1, head_dim // 2, 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


def _quotient(width: int, heads: Any) -> int:
    return width // heads if isinstance(heads, int) and heads > 0 else 0
