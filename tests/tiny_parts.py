"""Random tiny parts of a LLaVA: a CLIP directory, a Llama directory, a GGUF file, a projector, an adapter."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from safetensors.numpy import save_file
from tiny_checkpoints import PREPROCESSOR, VISION, hf_config, random_tensors, write_processor, write_weights
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

WIDTH, HEADS, KV_HEADS, FFN = 64, 4, 2, 96
LINES = [
    "the capital of France is Paris, isn't it?",
    "12 apples and 345 pears  cost 6 francs",
    "naïve café 東京\n\n",
] * 3
CONTROL = ("<|end|>", "<|start|>", "<|stop|>", "<unused>")
TURNS = "{% for message in messages %}<|start|>{{ message['content'] }}<|stop|>{% endfor %}"


def write_clip(directory: Path, tensors: Mapping[str, np.ndarray]) -> Path:
    """Writes the vision tower of a LLaVA's tensors as a CLIPVisionModel."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(VISION))
    (directory / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    write_weights(directory, {name.removeprefix("vision_tower."): value for name, value in part(tensors, "vision")})
    return directory


def write_llama(directory: Path, tensors: Mapping[str, np.ndarray], **changes: Any) -> Path:
    """Writes the decoder of a LLaVA's tensors as a LlamaForCausalLM, with a tokenizer that knows <image>."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({**hf_config()["text_config"], **changes}))
    write_weights(directory, {name.removeprefix("language_model."): value for name, value in part(tensors, "language")})
    write_processor(directory)
    return directory


def write_projector(file: Path, tensors: Mapping[str, np.ndarray]) -> Path:
    save_file(dict(part(tensors, "multi")), file)
    return file


def part(tensors: Mapping[str, np.ndarray], prefix: str) -> list[tuple[str, np.ndarray]]:
    return [(name, value) for name, value in tensors.items() if name.startswith(prefix)]


def write_adapter(
    directory: Path, factors: Mapping[str, tuple[np.ndarray, np.ndarray]], prefix: str = "base_model.model.", **changes
) -> Path:
    """Writes a PEFT adapter of {weight: (A, B)}."""
    directory.mkdir()
    tensors = {f"{prefix}{name}.lora_A.weight": a for name, (a, _) in factors.items()}
    tensors |= {f"{prefix}{name}.lora_B.weight": b for name, (_, b) in factors.items()}
    save_file(tensors, directory / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "use_dora": False, "alpha_pattern": {}}
    (directory / "adapter_config.json").write_text(json.dumps({**settings, **changes}))
    return directory


def byte_level_vocabulary() -> tuple[list[str], list[str]]:
    """Returns the tokens and merges of a BPE over bytes, control tokens first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=list(CONTROL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    written = json.loads(tokenizer.to_str())["model"]
    return sorted(written["vocab"], key=written["vocab"].get), [" ".join(merge) for merge in written["merges"]]


def scored_vocabulary() -> tuple[list[str], list[float], list[int]]:
    """Returns tokens, scores and types as SentencePiece has them: special ones, bytes, pieces."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=90, show_progress=False))
    vocabulary = tokenizer.get_vocab()
    letters = {token for token in vocabulary if len(token) == 1}
    pieces = sorted(set(vocabulary) - letters, key=vocabulary.__getitem__) + sorted(letters)
    special, single = ["<unk>", "<s>", "</s>"], [f"<0x{value:02X}>" for value in range(256)]
    tokens = [*special, *single, *pieces]
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(pieces))]
    return tokens, scores, [2, 3, 3, *[6] * 256, *[1] * len(pieces)]


def write_gguf(
    file: Path,
    kind: Kind = Kind.F32,
    *,
    tied: bool = False,
    vocabulary: str = "gpt2",
    pre: str | None = "smollm",
    metadata: Mapping[str, Any] = {},
    tensors: Mapping[str, np.ndarray] = {},
    raw_kinds: Mapping[str, Kind] = {},
) -> Path:
    """Writes a random Llama of 2 layers with 4 query and 2 kv heads, its matrices quantized as `kind`.

    `metadata` and `tensors` are added or replace others; `raw_kinds` are types to be claimed for tensors as given.
    """
    writer = gguf.GGUFWriter(str(file), "llama")
    _write_vocabulary(writer, vocabulary, pre)
    count = len(byte_level_vocabulary()[0] if vocabulary == "gpt2" else scored_vocabulary()[0])
    writer.add_name("tiny")
    for name, value in {**_settings(), **metadata}.items():
        if value is not None:
            {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}[
                type(value)
            ](name, value)
    for name, array in {**_random_weights(count, tied), **tensors}.items():
        if name in raw_kinds:
            writer.add_tensor(name, array, raw_dtype=raw_kinds[name])
        elif array.ndim == 1:
            writer.add_tensor(name, array)
        else:
            writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _settings() -> dict[str, Any]:
    return {
        "llama.context_length": 128,
        "llama.embedding_length": WIDTH,
        "llama.block_count": 2,
        "llama.feed_forward_length": FFN,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 5e4,
        "llama.rope.dimension_count": WIDTH // HEADS,
    }


def _write_vocabulary(writer: gguf.GGUFWriter, kind: str, pre: str | None) -> None:
    writer.add_tokenizer_model(kind)
    if kind == "gpt2":
        tokens, merges = byte_level_vocabulary()
        writer.add_token_list(tokens)
        writer.add_token_types([3 if token in CONTROL else 1 for token in tokens])
        writer.add_token_merges(merges)
        if pre is not None:
            writer.add_tokenizer_pre(pre)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_pad_token_id(2)
        writer.add_chat_template(TURNS)
        return
    tokens, scores, types = scored_vocabulary()
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _random_weights(count: int, tied: bool) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return (rng.standard_normal((rows, columns)) * columns**-0.5).astype(np.float32)

    def norm() -> np.ndarray:
        return (1 + 0.1 * rng.standard_normal(WIDTH)).astype(np.float32)

    kv = WIDTH // HEADS * KV_HEADS
    found = {"token_embd.weight": matrix(count, WIDTH) * 8, "output_norm.weight": norm()}
    if not tied:
        found["output.weight"] = matrix(count, WIDTH)
    for layer in range(2):
        shapes = {"attn_q": (WIDTH, WIDTH), "attn_k": (kv, WIDTH), "attn_v": (kv, WIDTH), "attn_output": (WIDTH, WIDTH)}
        shapes |= {"ffn_gate": (FFN, WIDTH), "ffn_up": (FFN, WIDTH), "ffn_down": (WIDTH, FFN)}
        found |= {f"blk.{layer}.{name}.weight": matrix(*shape) for name, shape in shapes.items()}
        found |= {f"blk.{layer}.{name}.weight": norm() for name in ("attn_norm", "ffn_norm")}
    return found


def tensors(**changes: Any) -> dict[str, np.ndarray]:
    """Returns the tensors of a whole tiny LLaVA under their llava-hf names."""
    return random_tensors(hf_config(**changes))
