"""CLIP's image tower out of an int8 ONNX file: an ordinary CLIPVisionModel directory, in float32."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from convert.tower import PREPROCESSOR, preprocessor
from lmmjax.errors import InputError
from lmmjax.files import atomic_directory

CONFIG = {
    "architectures": ["CLIPVisionModel"],
    "model_type": "clip_vision_model",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 16,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "projection_dim": 512,
    "dtype": "float32",
}
"""CLIP ViT-B/16."""


def write_tower(file: Path, target: Path) -> None:
    """Writes the directory `target` from an ONNX file of CLIP ViT-B/16 with weights of 8 bits.

    The file's graph rounds activations too; only its weights are taken, as integers times their scale.
    """
    with atomic_directory(target) as directory:
        save_file(read_weights(file), directory / "model.safetensors", metadata={"format": "pt"})
        for name, content in (("config.json", CONFIG), (PREPROCESSOR, preprocessor(CONFIG))):
            (directory / name).write_text(json.dumps(content, indent=2) + "\n")


def require_onnx() -> None:
    """Raises InputError where the file could not be read: to be asked before it is downloaded."""
    if importlib.util.find_spec("onnx") is None:
        raise InputError(
            "the tower comes as an ONNX file, and onnx is not installed: pip install onnx, or give --vision DIR"
        )


def read_weights(file: Path) -> dict[str, np.ndarray]:
    """Returns the tower's weights under Hugging Face's names, as (out, in).

    Biases, norms and embeddings are stored whole, under these names. A matrix is known by the node that
    multiplies by it alone: its path is the linear's.
    """
    import onnx

    graph = onnx.load(file).graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    weights = {name: _array(tensor) for name, tensor in stored.items() if name.startswith("vision_model.")}
    for node in graph.node:
        if node.op_type == "MatMulInteger" and node.name.startswith("/vision_model/"):
            path = node.name.strip("/").removesuffix("/MatMul_quant").replace("/", ".")
            weights[f"{path}.weight"] = _matrix(stored, node.input[1].removesuffix("_quantized"))
    return weights


def _matrix(stored: dict[str, Any], name: str) -> np.ndarray:
    codes, scale, zero = (_array(stored[f"{name}_{part}"]) for part in ("quantized", "scale", "zero_point"))
    return np.ascontiguousarray(((codes.astype(np.float32) - zero) * scale).T)


def _array(tensor: Any) -> np.ndarray:
    from onnx import numpy_helper

    return numpy_helper.to_array(tensor)
