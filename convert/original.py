"""The original LLaVA's checkpoints: config, tokenizer and tower brought into Hugging Face's form."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert.source import Material


def is_original(raw: Mapping[str, Any]) -> bool:
    """Returns whether a config.json is the original LLaVA's."""
    return "mm_vision_tower" in raw or "LlavaLlamaForCausalLM" in (raw.get("architectures") or ())


def gather(source: Path, raw: Mapping[str, Any], vision: Path | None, scratch: Path) -> Material:
    raise NotImplementedError
