"""One table of Hugging Face's tensor names and ours, used in both directions, and the other spellings of a name.

The table's names are those of the llava-hf checkpoints. `canonical` brings every other layout to them: what
transformers 5 saves, what it holds in memory, the original LLaVA's, and that of a decoder alone, to which `spelled`
leads back. `#` stands for a layer's number.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from lmmjax import llava
from lmmjax.config import LlavaConfig

Shape = tuple[int, ...]

SAME, TRANSPOSED, PATCHES = "same", "transposed", "patches"
"""Layout rules: as it is; (out, in) <-> (in, out); (e, channel, row, column) <-> (channel * row * column, e)."""

_TOWER, _DECODER = "vision_tower.vision_model.", "language_model."
_VISION_LAYER, _TEXT_LAYER = f"{_TOWER}encoder.layers.#.", f"{_DECODER}model.layers.#."
LM_HEAD = f"{_DECODER}lm_head.weight"
EMBEDDING = f"{_DECODER}model.embed_tokens.weight"


def _biased(theirs: str, ours: str) -> dict[str, tuple[str, str]]:
    return {f"{theirs}.weight": (f"{ours}.kernel", TRANSPOSED), f"{theirs}.bias": (f"{ours}.bias", SAME)}


def _norm(theirs: str, ours: str) -> dict[str, tuple[str, str]]:
    return {f"{theirs}.weight": (f"{ours}.scale", SAME), f"{theirs}.bias": (f"{ours}.bias", SAME)}


TABLE: Mapping[str, tuple[str, str]] = {
    f"{_TOWER}embeddings.class_embedding": ("vision.class_embed", SAME),
    f"{_TOWER}embeddings.patch_embedding.weight": ("vision.patch_embed.kernel", PATCHES),
    f"{_TOWER}embeddings.position_embedding.weight": ("vision.position_embed", SAME),
    **_norm(f"{_TOWER}pre_layrnorm", "vision.pre_norm"),  # their spelling
    **_biased(f"{_VISION_LAYER}self_attn.q_proj", "vision.layers_#.attn.q"),
    **_biased(f"{_VISION_LAYER}self_attn.k_proj", "vision.layers_#.attn.k"),
    **_biased(f"{_VISION_LAYER}self_attn.v_proj", "vision.layers_#.attn.v"),
    **_biased(f"{_VISION_LAYER}self_attn.out_proj", "vision.layers_#.attn.o"),
    **_norm(f"{_VISION_LAYER}layer_norm1", "vision.layers_#.norm_1"),
    **_biased(f"{_VISION_LAYER}mlp.fc1", "vision.layers_#.up"),
    **_biased(f"{_VISION_LAYER}mlp.fc2", "vision.layers_#.down"),
    **_norm(f"{_VISION_LAYER}layer_norm2", "vision.layers_#.norm_2"),
    **_norm(f"{_TOWER}post_layernorm", "vision.post_norm"),
    **_biased("multi_modal_projector.linear_1", "projector.linear_1"),
    **_biased("multi_modal_projector.linear_2", "projector.linear_2"),
    EMBEDDING: ("text.embedding", SAME),
    f"{_TEXT_LAYER}input_layernorm.weight": ("text.layers_#.attn_norm.scale", SAME),
    f"{_TEXT_LAYER}self_attn.q_proj.weight": ("text.layers_#.attn.q.kernel", TRANSPOSED),
    f"{_TEXT_LAYER}self_attn.k_proj.weight": ("text.layers_#.attn.k.kernel", TRANSPOSED),
    f"{_TEXT_LAYER}self_attn.v_proj.weight": ("text.layers_#.attn.v.kernel", TRANSPOSED),
    f"{_TEXT_LAYER}self_attn.o_proj.weight": ("text.layers_#.attn.o.kernel", TRANSPOSED),
    f"{_TEXT_LAYER}post_attention_layernorm.weight": ("text.layers_#.mlp_norm.scale", SAME),
    f"{_TEXT_LAYER}mlp.gate_proj.weight": ("text.layers_#.mlp.gate.kernel", TRANSPOSED),
    f"{_TEXT_LAYER}mlp.up_proj.weight": ("text.layers_#.mlp.up.kernel", TRANSPOSED),
    f"{_TEXT_LAYER}mlp.down_proj.weight": ("text.layers_#.mlp.down.kernel", TRANSPOSED),
    f"{_DECODER}model.norm.weight": ("text.norm.scale", SAME),
    LM_HEAD: ("text.lm_head.kernel", TRANSPOSED),
}
# Spellings of other layouts, the first that fits: in memory (transformers 5), original LLaVA, saved by transformers 5,
# a decoder alone.
_SPELLINGS = (
    (r"model\.language_model\.", "language_model.model."),
    (r"lm_head\.", "language_model.lm_head."),
    (r"model\.multi_modal_projector\.", "multi_modal_projector."),
    (r"model\.mm_projector\.0\.", "multi_modal_projector.linear_1."),
    (r"model\.mm_projector\.2\.", "multi_modal_projector.linear_2."),
    (r"(model\.)?vision_tower\.(vision_tower\.)?(vision_model\.)?(?=embeddings|encoder|pre_layr|post_layer)", _TOWER),
    (r"model\.(?=layers|embed_tokens|norm)", "language_model.model."),
)
PEFT_PREFIX = "base_model.model."
"""What PEFT, and the original LLaVA's LoRA releases, put before every name."""
_BUFFER = re.compile(r"(^|\.)(position_ids|rotary_emb\.inv_freq)$")


@dataclasses.dataclass(frozen=True)
class Slot:
    """One weight: its name and shape at Hugging Face, its dotted name here, and the rule between the layouts."""

    name: str
    leaf: str
    shape: Shape
    rule: str

    @property
    def our_shape(self) -> Shape:
        return self.shape if self.rule == SAME else (math.prod(self.shape[1:]), self.shape[0])

    def to_ours(self, array: np.ndarray) -> np.ndarray:
        return array if self.rule == SAME else array.reshape(len(array), -1).T

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        return array if self.rule == SAME else array.T.reshape(self.shape)


def canonical(name: str) -> str | None:
    """Returns the llava-hf name of a tensor of any layout; None for a buffer that holds no weights."""
    if _BUFFER.search(name):
        return None
    for pattern, replacement in _SPELLINGS:
        if match := re.match(pattern, name):
            return replacement + name[match.end() :]
    return name


def spelled(config: LlavaConfig, name: str) -> str:
    """Returns a llava-hf name as checkpoints of this config spell it: a decoder alone is no part of anything."""
    return name if config.sees else name.removeprefix(_DECODER)


def slots(config: LlavaConfig) -> list[Slot]:
    """Returns every weight that a checkpoint of this shape has, in the order in which the model reads them.

    That includes what no forward pass needs but transformers' model has: the tower's layers behind the last
    feature, and its post-norm.
    """
    theirs = {ours: (name, rule) for name, (ours, rule) in TABLE.items()}
    found = []
    for leaf, shape in expected(config).items():
        name, rule = theirs[_pattern(leaf)]
        number = re.search(r"layers_(\d+)", leaf)
        name = spelled(config, name.replace("#", number[1] if number else "#"))
        found.append(Slot(name, leaf, _their_shape(config, shape, rule), rule))
    return sorted(found, key=_reading_order)


def expected(config: LlavaConfig) -> dict[str, Shape]:
    """Returns {dotted name: shape} of all our leaves, unread ones included."""
    leaves: dict[str, Any] = dict(flatten_dict(llava.shapes(config), sep="."))
    return {leaf: value.shape for leaf, value in leaves.items()}


def _pattern(leaf: str) -> str:
    return re.sub(r"layers_\d+", "layers_#", leaf)


def _their_shape(config: LlavaConfig, shape: Shape, rule: str) -> Shape:
    if rule == PATCHES:
        size = config.tower.patch_size
        return shape[-1], config.tower.channels, size, size
    return shape[::-1] if rule == TRANSPOSED else shape


def _reading_order(slot: Slot) -> tuple[int, int]:
    """One layer after the other: whoever moves weights in this order holds a layer at a time."""
    number = re.search(r"layers_(\d+)", slot.leaf)
    return ("vision", "projector", "text").index(slot.leaf.split(".")[0]), int(number[1]) if number else -1
