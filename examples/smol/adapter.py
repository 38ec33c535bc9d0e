"""What training leaves, as files: the projector under LLaVA's names, the adapters as PEFT writes them, in float16."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from examples.smol.lora import ALPHA, RANK, Factors
from lmmjax.config import LINEARS
from lmmjax.files import atomic_directory

PROJECTOR = "projector.safetensors"
_MODULES = {name: f"{'self_attn' if name in 'qkvo' else 'mlp'}.{name}_proj" for name in LINEARS}


def write(directory: Path, projector: Any, factors: Factors) -> None:
    """Writes the new directory `directory`; `projector` takes plain features and makes plain embeddings."""
    with atomic_directory(directory) as temporary:
        save_file(_half(_projector(projector)), temporary / PROJECTOR, metadata={"format": "pt"})
        save_file(_half(_factors(factors)), temporary / "adapter_model.safetensors", metadata={"format": "pt"})
        (temporary / "adapter_config.json").write_text(json.dumps(settings(), indent=2) + "\n")


def settings() -> dict[str, Any]:
    """Returns PEFT's description of the adapters."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [name.split(".")[1] for name in _MODULES.values()],
        "inference_mode": True,
    }


def _projector(projector: Any) -> dict[str, np.ndarray]:
    named = {}
    for name, leaves in projector.items():
        named[f"multi_modal_projector.{name}.weight"] = np.asarray(leaves["kernel"]).T
        named[f"multi_modal_projector.{name}.bias"] = np.asarray(leaves["bias"])
    return named


def _factors(factors: Factors) -> dict[str, np.ndarray]:
    named = {}
    for layer, linears in factors.items():
        for name, pair in linears.items():
            path = f"base_model.model.model.{layer.replace('_', '.')}.{_MODULES[name]}"
            named[f"{path}.lora_A.weight"] = np.asarray(pair["down"]).T
            named[f"{path}.lora_B.weight"] = np.asarray(pair["up"]).T
    return named


def _half(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.ascontiguousarray(tensor, np.float16) for name, tensor in tensors.items()}
