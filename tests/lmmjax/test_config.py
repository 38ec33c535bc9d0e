"""Real configs are read in both spellings; whatever would change the model and is not handled is named."""

import pytest
from tiny_checkpoints import hf_config
from tiny_texts import text_config

from lmmjax.config import from_hf
from lmmjax.errors import InputError

# As they are published (llava-hf), names and training settings left in.
LLAVA_7B = {
    "architectures": ["LlavaForConditionalGeneration"],
    "ignore_index": -100,
    "image_seq_length": 576,
    "image_token_index": 32000,
    "model_type": "llava",
    "pad_token_id": 32001,
    "projector_hidden_act": "gelu",
    "text_config": {
        "_name_or_path": "lmsys/vicuna-7b-v1.5",
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "rms_norm_eps": 1e-05,
        "torch_dtype": "float16",
        "vocab_size": 32064,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.36.0.dev0",
    "vision_config": {
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "model_type": "clip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
        "vocab_size": 32000,
    },
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "vocab_size": 32064,
}
LLAVA_13B = {
    **LLAVA_7B,
    "text_config": {
        **LLAVA_7B["text_config"],
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_attention_heads": 40,
        "num_hidden_layers": 40,
        "num_key_value_heads": 40,
    },
}
BAKLLAVA = {
    **LLAVA_7B,
    "text_config": {
        "_name_or_path": "mistralai/Mistral-7B-v0.1",
        "architectures": ["MistralForCausalLM"],
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "sliding_window": 4096,
        "torch_dtype": "float32",
        "vocab_size": 32064,
    },
}
# Decoders alone: huggyllama/llama-7b, meta-llama/Llama-2-7b-hf, HuggingFaceTB/SmolLM2-135M, mistralai/Mistral-7B-v0.1.
LLAMA_7B = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "initializer_range": 0.02,
    "max_sequence_length": 2048,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "torch_dtype": "float16",
    "transformers_version": "4.28.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
LLAMA_2_7B = {
    **{name: value for name, value in LLAMA_7B.items() if name != "max_sequence_length"},
    "_name_or_path": "meta-llama/Llama-2-7b-hf",
    "max_position_embeddings": 4096,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
}
SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "vocab_size": 49152,
}
MISTRAL_7B = {**BAKLLAVA["text_config"], "vocab_size": 32000}
# What transformers 4 wrote into each part as well.
LEGACY = {
    "add_cross_attention": False,
    "prune_heads": {},
    "bad_words_ids": None,
    "max_length": 20,
    "torchscript": False,
}


def test_llava_7b():
    config = from_hf(LLAVA_7B)
    assert (config.vision.image_tokens, config.vision.feature_layers) == (576, (23,))
    assert (config.text.layers, config.text.heads, config.text.kv_heads, config.text.head_dim) == (32, 32, 32, 128)
    assert (config.text.vocab, config.text.width, config.text.ffn, config.text.context) == (32064, 4096, 11008, 4096)
    assert (config.image_token, config.text.eps, config.text.tied) == (32000, 1e-5, False)


def test_llava_13b():
    text = from_hf(LLAVA_13B).text
    assert (text.width, text.ffn, text.layers, text.kv_heads, text.head_dim) == (5120, 13824, 40, 40, 128)


def test_bakllava_is_read_as_far_as_its_sliding_window():
    text = from_hf(BAKLLAVA).text
    assert (text.kv_heads, text.ffn, text.context) == (8, 14336, 4096)
    whole = from_hf({**BAKLLAVA, "text_config": {**BAKLLAVA["text_config"], "sliding_window": None}})
    assert whole.text.context == 32768


def test_what_transformers_4_wrote_besides_is_harmless():
    config = hf_config(text=LEGACY, vision={**LEGACY, "dropout": 0.0}, **LEGACY)
    assert from_hf(config) == from_hf(hf_config())


def test_both_spellings_say_the_same():
    old = hf_config(text={"rope_theta": 5e5})
    new = hf_config(text={"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, image_token_id=3)
    del new["image_token_index"]
    assert from_hf(old) == from_hf(new)
    assert (from_hf(new).text.rope_theta, from_hf(new).image_token) == (5e5, 3)


def test_what_is_left_out_has_the_librarys_default():
    config = from_hf({"model_type": "llava"})
    assert (config.vision.layers, config.text.layers, config.image_token) == (24, 32, 32000)


def test_the_number_of_image_tokens_may_be_told_or_left_at_the_librarys_default():
    for told in (4, 576):
        assert from_hf(hf_config(image_seq_length=told)) == from_hf(hf_config())


def test_feature_layers_count_hidden_states():
    assert from_hf(hf_config(vision_feature_layer=[-2, 3, 0])).vision.feature_layers == (2, 3, 0)
    assert from_hf(hf_config(vision_feature_select_strategy="full")).vision.image_tokens == 5


def test_decoders_alone():
    for raw, context, eps in ((LLAMA_7B, 2048, 1e-6), (LLAMA_2_7B, 4096, 1e-5)):
        config = from_hf(raw)
        assert (config.vision, config.image_token, config.sees) == (None, None, False)
        text = config.text
        assert (text.layers, text.heads, text.kv_heads, text.head_dim, text.ffn) == (32, 32, 32, 128, 11008)
        assert (text.vocab, text.context, text.eps, text.tied) == (32000, context, eps, False)
    text = from_hf(SMOLLM2).text
    assert (text.heads, text.kv_heads, text.head_dim, text.rope_theta, text.tied) == (9, 3, 64, 1e5, True)
    text = from_hf(MISTRAL_7B).text
    assert (text.kv_heads, text.ffn, text.context) == (8, 14336, 4096)


def test_a_decoder_alone_is_that_of_a_llava():
    for kind in ("llama", "mistral"):
        part = {"model_type": kind, "sliding_window": 64, "rope_theta": 5e5, **LEGACY}
        assert from_hf(text_config(**part)).text == from_hf(hf_config(text=part)).text


def test_what_a_decoder_alone_leaves_out_has_its_own_librarys_default():
    assert from_hf({"model_type": "llama"}).text.context == 2048
    text = from_hf({"model_type": "mistral"}).text
    assert (text.ffn, text.kv_heads, text.context) == (14336, 8, 4096)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"attention_bias": True}, "json: attention_bias = True is not handled"),
        ({"mlp_bias": True}, "json: mlp_bias = True is not handled"),
        ({"hidden_act": "gelu"}, "json: hidden_act = 'gelu' is not handled"),
        ({"invented": 1}, "json: invented = 1 is not handled"),
        ({"vision_config": {}}, "json: vision_config = {} is not handled"),
        ({"quantization_config": {"bits": 4}}, "json: quantization_config = {'bits': 4} is not handled"),
        ({"rope_interleaved": True}, "json: rope_interleaved = True is not handled"),
        ({"max_sequence_length": 99}, "json: max_sequence_length = 99, but max_position_embeddings = 128"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "json: rope_parameters = "),
        ({"rope_theta": 0}, "json: rope_theta = 0, expected a number above 0"),
        ({"num_hidden_layers": 0}, "json: num_hidden_layers = 0, expected at least 1"),
        ({"num_key_value_heads": 3}, "query heads are no multiple of kv heads"),
        ({"head_dim": -8}, "json: head_dim = -8, expected at least 2"),
        ({"hidden_size": "wide"}, "'hidden_size' expected int"),
        ({"model_type": "qwen2"}, "model_type is 'qwen2'; expected 'llava' (LLaVA 1.5), or 'llama' or 'mistral' for"),
        ({"model_type": None}, "model_type is None; expected"),
    ],
)
def test_what_is_not_handled_of_a_decoder_alone_is_named(changes: dict, named: str):
    for kind in ("llama", "mistral"):
        with pytest.raises(InputError) as caught:
            from_hf({**text_config(kind), **changes})
        assert named in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"text": {"attention_bias": True}}, "text_config.attention_bias = True is not handled"),
        ({"text": {"hidden_act": "gelu"}}, "text_config.hidden_act = 'gelu' is not handled"),
        ({"text": {"invented": 1}}, "text_config.invented = 1 is not handled"),
        ({"text": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}}, "text_config.rope_parameters"),
        ({"text": {"is_decoder": True}}, "text_config.is_decoder = True is not handled"),
        ({"vision": {"attention_dropout": 0.0, "invented": 1}}, "vision_config.invented = 1 is not handled"),
        ({"vision": {"hidden_act": "relu"}}, "vision_config.hidden_act = 'relu' is not handled"),
        ({"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4} is not handled"),
        ({"vision_feature_select_strategy": "cls"}, "vision_feature_select_strategy"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act = 'relu'"),
        ({"vision_feature_layer": -5}, "vision_feature_layer = [-5]; the tower has 3 layers"),
        ({"vision": {"image_size": 30}}, "vision_config.image_size is no multiple of patch_size"),
        ({"vision": {"num_attention_heads": 5}}, "not a multiple of the number of attention heads"),
        ({"text": {"num_key_value_heads": 3}}, "query heads are no multiple of kv heads"),
        ({"text": {"head_dim": 7}}, "`head_dim`=7"),
        ({"text": {"num_hidden_layers": 0}}, "text_config.num_hidden_layers = 0, expected at least 1"),
        ({"text": {"head_dim": -8}}, "text_config.head_dim = -8, expected at least 2"),
        ({"text": {"rope_theta": 0}}, "text_config.rope_theta = 0, expected a number above 0"),
        ({"text": {"rope_theta": "x"}}, "rope_theta"),
        ({"vision": {"image_size": [28, 28]}}, "vision_config.image_size = [28, 28], expected at least 1"),
        ({"vision_feature_layer": []}, "vision_feature_layer = [], expected layers' numbers"),
        ({"image_token_index": -1}, "image_token_index = -1, expected a token's id"),
        ({"image_seq_length": 5}, "image_seq_length = 5, but the vision tower makes 4 tokens of an image"),
        ({"vision": {"hidden_size": "wide"}}, "'hidden_size' expected int"),
        ({"vocab_size": 7}, "vocab_size is not that of text_config"),
        ({"model_type": "llava_next"}, "model_type is 'llava_next'; expected 'llava'"),
        ({"text": {"model_type": "qwen2"}}, "text_config.model_type is 'qwen2'; expected llama or mistral"),
        ({"vision": {"model_type": "siglip_vision_model"}}, "vision_config.model_type is 'siglip_vision_model'"),
        ({"text_config": 3}, "text_config.model_type is 3"),
    ],
)
def test_what_is_not_handled_is_named(changes: dict, named: str):
    with pytest.raises(InputError) as caught:
        from_hf(hf_config(**changes))
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_all_that_is_not_handled_is_named_at_once():
    with pytest.raises(InputError, match=r"(?=.*attention_bias)(?=.*vision_config\.invented)(?=.*relu)"):
        from_hf(hf_config(text={"attention_bias": True}, vision={"invented": 1}, projector_hidden_act="relu"))
