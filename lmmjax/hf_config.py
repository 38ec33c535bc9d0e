"""What a Hugging Face config says: attributes that are handled, that change nothing, and all others by their names."""

import math
from collections.abc import Mapping
from typing import Any

from lmmjax.errors import InputError

DECODERS = ("llama", "mistral")
"""Kinds of decoder, by `model_type`. A Mistral is a Llama up to its sliding window."""

VISION = frozenset(
    "hidden_size intermediate_size num_hidden_layers num_attention_heads image_size patch_size num_channels "
    "hidden_act layer_norm_eps vocab_size".split()
)
TEXT = frozenset(
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "max_position_embeddings max_sequence_length rope_parameters rms_norm_eps tie_word_embeddings "
    "sliding_window".split()
)
LLAVA = frozenset(
    "vision_config text_config image_token_index image_token_id image_seq_length vision_feature_layer "
    "vision_feature_select_strategy projector_hidden_act multimodal_projector_bias tie_word_embeddings "
    "vocab_size".split()
)
# Attributes that say nothing about the forward pass (names, training, generation defaults, output switches).
_INERT = frozenset(
    "transformers_version architectures output_hidden_states output_attentions return_dict dtype torch_dtype "
    "chunk_size_feed_forward is_encoder_decoder id2label label2id problem_type _name_or_path initializer_range "
    "initializer_factor use_cache pad_token_id bos_token_id eos_token_id attention_dropout pretraining_tp "
    "projection_dim model_type ignore_index _attn_implementation_autoset use_bfloat16 torchscript "
    "is_llama_config".split()
)
# What transformers 4 wrote into every part and 5 no longer knows, and what only some files say; harmless at these
# values.
_LEGACY = {
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "is_decoder": False,
    "tie_encoder_decoder": False,
    "tf_legacy_loss": False,
    "prune_heads": {},
    "pruned_heads": {},
    "finetuning_task": None,
    "task_specific_params": None,
    "tokenizer_class": None,
    "prefix": None,
    "sep_token_id": None,
    "dropout": 0.0,
    "attention_bias": False,
    "mlp_bias": False,
    "rope_interleaved": False,
}
_COUNTS = frozenset(
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads image_size "
    "patch_size num_channels max_position_embeddings".split()
)


def filled(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the config with the library's defaults filled in, in the spelling of its current version."""
    from transformers import LlamaConfig, LlavaConfig, MistralConfig  # configurations only: no torch, no model code

    kinds = {"llava": LlavaConfig, "llama": LlamaConfig, "mistral": MistralConfig}
    try:
        return kinds[raw["model_type"]](**raw).to_dict()
    except Exception as error:  # its validators raise many kinds, each over several lines
        raise InputError(f"config.json: {' '.join(str(error).split())}") from error


def unhandled(prefix: str, got: Mapping, default: Mapping, handled: frozenset[str]) -> list[str]:
    """Returns a message for every attribute that would change the model and is not in `handled`."""
    missing = object()
    return [
        f"{prefix}{name} = {value!r} is not handled"
        for name, value in got.items()
        if name not in handled and name not in _INERT and value != default.get(name, _LEGACY.get(name, missing))
    ]


def small_counts(prefix: str, part: Mapping) -> list[str]:
    """Returns a message for every number of things of which there is none."""
    counts = {f"{prefix}{name}": part[name] for name in _COUNTS & set(part)}
    return [f"{name} = {count}, expected at least 1" for name, count in counts.items() if not is_int(count, 1)]


def decoder_problems(prefix: str, text: Mapping) -> list[str]:
    """Returns a message for every attribute of a decoder, its counts being good, that is out of range."""
    rope, context = text["rope_parameters"], text["max_position_embeddings"]
    theta, length = rope.get("rope_theta", 1.0), text.get("max_sequence_length", context)
    plain = rope.get("rope_type", "default") == "default" and set(rope) <= {"rope_type", "rope_theta"}
    return broken(
        (plain, f"{prefix}rope_parameters = {rope} is not handled"),
        (is_positive(theta), f"{prefix}rope_theta = {theta!r}, expected a number above 0"),
        (is_int(head_dim(text), 2), f"{prefix}head_dim = {text['head_dim']!r}, expected at least 2"),
        # The first LLaMA's name for the context; transformers does not read it.
        (length == context, f"{prefix}max_sequence_length = {length!r}, but max_position_embeddings = {context}"),
        (text["num_attention_heads"] % text["num_key_value_heads"] == 0, "query heads are no multiple of kv heads"),
    )


def broken(*rules: tuple[object, str]) -> list[str]:
    """Returns the messages of the rules that do not hold."""
    return [message for holds, message in rules if not holds]


def head_dim(text: Mapping) -> int:
    return text["head_dim"] or text["hidden_size"] // text["num_attention_heads"]


def is_int(value: object, least: float = -math.inf) -> bool:
    return type(value) is int and value >= least


def is_positive(value: object) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf  # pyright: ignore[reportOperatorIssue]
