"""Random tiny checkpoints of a decoder alone, with a tokenizer of single bytes; written without torch."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tiny_checkpoints import TEXT, random_tensors, write_processor, write_weights

CHAT_TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}


def text_config(kind: str = "llama", **changes: Any) -> dict[str, Any]:
    """Returns a config.json of 2 layers with 4 query and 2 kv heads and a context of 128, and these changes."""
    return {**TEXT, "model_type": kind, "architectures": [ARCHITECTURES[kind]], **changes}


def write_text(
    directory: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray] | None = None, chat: bool = True
) -> Path:
    """Writes a whole Hugging Face directory and returns it; weights are random where none are given."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    write_weights(directory, random_tensors(config) if tensors is None else tensors)
    write_text_processor(directory, chat)
    return directory


def write_text_processor(directory: Path, chat: bool = True) -> None:
    """Writes a byte-level tokenizer that begins every text with <s>, and a chat template of plain text."""
    write_processor(directory)
    (directory / "preprocessor_config.json").unlink()
    (directory / "chat_template.jinja").unlink()
    if chat:
        (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
