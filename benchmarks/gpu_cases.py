"""What whole models are measured on, on a GPU: LLaVA-1.5's geometries, and decode steps by batch, context and format.

Without JAX or torch: each side reads it in a process of its own.
"""

from typing import Any, NamedTuple

_VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}


def _llava(width: int, ffn: int, layers: int, heads: int, vision: dict[str, Any] | None = None) -> dict[str, Any]:
    text = {
        "model_type": "llama",
        "vocab_size": 32064,
        "hidden_size": width,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    }
    return {
        "model_type": "llava",
        "image_token_index": 32000,
        "vision_config": _VISION | (vision or {}),
        "text_config": text,
    }


MODELS: dict[str, dict[str, Any]] = {
    "7b": _llava(4096, 11008, 32, 32),
    "13b": _llava(5120, 13824, 40, 40),
    "smoke": _llava(
        64, 128, 2, 2, {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ),
}
"""Hugging Face configs that get random weights in bfloat16."""

NEW = 128
"""Tokens that an answer has: a decode step is timed over the last so many of a context."""
QUESTION = 64
"""Tokens of text in a prompt, beside the image's."""


class Case(NamedTuple):
    """A decode step: rows, tokens a row at its end, bits of the cache, and the weights' format."""

    batch: int
    context: int
    bits: int = 16
    weights: str = "bf16"

    @property
    def name(self) -> str:
        return f"{self.batch}x{self.context} kv{self.bits} {self.weights}"

    @classmethod
    def parse(cls, text: str) -> "Case":
        """Returns the case of "BATCHxCONTEXT:BITS:WEIGHTS"; raises ValueError if it is none."""
        size, bits, weights = text.split(":", 2)
        batch, context = size.split("x")
        return cls(int(batch), int(context), int(bits), weights)
