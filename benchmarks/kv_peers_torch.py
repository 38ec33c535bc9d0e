"""Hugging Face's quantized KV cache, by transformers and optimum-quanto themselves, scored as lmmjax scores its own.

Samples go through torch one at a time, unpadded and teacher-forced: one forward pass over prompt and answer, each
layer's cache empty before. The weights are float32.

What an `axis` means there (optimum-quanto 0.2.7): a (b, h, n, d) tensor is taken as it lies in memory.
  0: groups are `group` neighbouring numbers, so up to group = d a group is channels of one token and head: per token,
     for keys too, although the library calls it per channel. Beyond d it spans tokens.
  -1: each channel has its own groups of `group` neighbours of the flattened (b, h, n): tokens of one head where the
     group divides n, else of several heads; b h n must be a multiple of the group, or quanto refuses.
transformers' default is axis 0 for both sides with groups of 64. KIVI's axes are -1 for keys, 0 for values.
Codes have 2 or 4 bits, the same for keys and values of a layer. Every group stores scale (max - min) / (2^b - 1) and
shift -min in the dtype of what was quantized: 2 x 16 bits a group in half precision, 2 x 32 in float32.
"""

import dataclasses
import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike
from transformers import LlavaForConditionalGeneration
from transformers.cache_utils import Cache, DynamicLayer, QuantoQuantizedLayer

from benchmarks.kv_peers import Predicted
from convert.export import export
from lmmjax.data import Encoded
from lmmjax.perplexity import CHUNK, Result, Window

Axis = Literal[0, -1]


@dataclasses.dataclass(frozen=True)
class Quanto:
    """One layer's format; see the module for what an axis means. `dtype` is what is quantized: it sets the metadata's.

    float16 is what a half-precision model's cache would hold; the arithmetic of quantizing is then float16, too.
    """

    bits: Literal[2, 4]
    group: int = 64
    key_axis: Axis = 0
    value_axis: Axis = 0
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"


Layers = Sequence[Quanto | None]
"""A format a decoder layer; None keeps the layer's tokens as they are."""


class RoundedAtOnce(QuantoQuantizedLayer):
    """transformers' own layer, but that attention sees what is stored from the first token on, and nothing else.

    Its own `update` quantizes the whole prompt and returns it unquantized, so that in the prefill no query sees any
    error; a teacher-forced score would be that of the dense cache. A residual does not exist here: of length 0,
    everything is quantized at every update.
    """

    def __init__(self, form: Quanto):
        super().__init__(
            nbits=form.bits,
            axis_key=form.key_axis,
            axis_value=form.value_axis,
            q_group_size=form.group,
            residual_length=0,
        )
        self.stored = getattr(torch, form.dtype)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any):
        """Returns all keys and values as the store gives them back, the new ones included."""
        super().update(key_states, value_states, *args, **kwargs)
        return self._dequantize(self._quantized_keys), self._dequantize(self._quantized_values)

    @property
    def sizes(self) -> dict[str, int]:
        """The bytes of the real tensors; `scales` are scales and shifts."""
        both: Any = (self._quantized_keys, self._quantized_values)
        scales = sum(stored._scale.nbytes + stored._shift.nbytes for stored in both)
        return {"codes": sum(stored._data._data.nbytes for stored in both), "scales": scales, "exact": 0}

    def _quantize(self, tensor: torch.Tensor, axis: int) -> Any:
        return super()._quantize(tensor.to(self.stored), axis)

    def _dequantize(self, qtensor: Any) -> torch.Tensor:
        return super()._dequantize(qtensor).float()


def load(checkpoint: Path) -> LlavaForConditionalGeneration:
    """Returns a dense lmmjax checkpoint as transformers' model in float32, by way of its export."""
    with tempfile.TemporaryDirectory() as scratch:
        export(checkpoint, Path(scratch) / "hf")
        return LlavaForConditionalGeneration.from_pretrained(Path(scratch) / "hf", dtype=torch.float32).eval()


def empty_cache(layers: Layers) -> Cache:
    """Returns an empty cache with a format a layer: quantized and exact layers side by side."""
    return Cache(layers=[DynamicLayer() if form is None else RoundedAtOnce(form) for form in layers])


def score(
    model: LlavaForConditionalGeneration, layers: Layers, parts: Sequence[Window], whole: int = 1
) -> Iterator[Result]:
    """Yields one window's sums after the other, as `lmmjax.perplexity.score` defines them.

    Windows are filled up at their end to multiples of `whole` tokens, of which the last window's groups partly consist;
    no token that is scored attends to them.
    """
    for window in parts:
        filling = [window.tokens[-1]] * (-len(window.tokens) % whole)
        states = _states(model, layers, [*window.tokens, *filling])
        at = range(window.first, len(window.tokens))
        # A few positions at a time: all of a window's logits would be 100 MB for 512 tokens of 49k words.
        chunks = (at[start : start + CHUNK] for start in range(0, len(at), CHUNK))
        nll = sum(_nll(model, states, window.tokens, chunk) for chunk in chunks)
        yield Result(np.array([nll]), np.array([len(at)]))


def answers(model: LlavaForConditionalGeneration, layers: Layers, encoded: Encoded) -> Iterator[Predicted]:
    """Yields every sample's log-probabilities of its answer tokens, for `kv_peers.compare`. Images are read anew."""
    assert encoded.pixels is not None, "the questions are about images"
    rows = zip(encoded.tokens, encoded.lengths, encoded.is_answer, encoded.pixels, strict=True)
    for tokens, length, wanted, pixels in rows:
        states = _states(model, layers, tokens[:length], pixels)
        yield _log_probs(model, states, np.flatnonzero(wanted)).numpy()


def sizes(model: LlavaForConditionalGeneration, layers: Layers, tokens: int) -> dict[str, int]:
    """Returns the bytes of a cache that holds so many tokens, from its real tensors: codes, scales and exact.

    Layers that are not quantized count two bytes a value.
    """
    cache, shape = empty_cache(layers), (1, *_row(model, tokens))
    any_values = torch.linspace(0, 1, math.prod(shape), dtype=torch.float16).reshape(shape)
    for index in range(len(layers)):
        cache.update(any_values, any_values.clone(), index)
    parts = [layer.sizes if isinstance(layer, RoundedAtOnce) else _exact(layer) for layer in cache.layers]
    return {kind: sum(part[kind] for part in parts) for kind in parts[0]}


def bits_per_value(model: LlavaForConditionalGeneration, layers: Layers, tokens: int) -> float:
    """Returns how many bits a key or value takes in the mean, all of `sizes` counted."""
    values = 2 * len(layers) * math.prod(_row(model, tokens))
    return sum(sizes(model, layers, tokens).values()) * 8 / values


def _row(model: LlavaForConditionalGeneration, tokens: int) -> tuple[int, int, int]:
    text = model.config.get_text_config()
    return text.num_key_value_heads, tokens, text.head_dim


def _exact(layer: Any) -> dict[str, int]:
    return {"codes": 0, "scales": 0, "exact": layer.keys.nbytes + layer.values.nbytes}


@torch.inference_mode()
def _states(
    model: LlavaForConditionalGeneration,
    layers: Layers,
    tokens: Sequence[int] | np.ndarray,
    pixels: Float[np.ndarray, "c y x"] | None = None,
) -> torch.Tensor:
    """Returns the final states (t, e) of one row through an empty cache."""
    cache = empty_cache(layers)
    image = {} if pixels is None else {"pixel_values": torch.from_numpy(np.array(pixels))[None]}
    states = model.model(input_ids=torch.tensor(np.array([tokens])), **image, cache=cache).last_hidden_state[0]
    # transformers takes unknown arguments without a word, and has called this one `past_key_values` before.
    if cache.get_seq_length() != len(tokens):
        raise RuntimeError("transformers did not use the cache that it was given; this was written for 5.24")
    return states


@torch.inference_mode()
def _log_probs(model: LlavaForConditionalGeneration, states: torch.Tensor, at: ArrayLike) -> torch.Tensor:
    """Returns the log-probabilities (n, v) of the tokens at these positions."""
    return torch.log_softmax(model.lm_head(states[torch.from_numpy(np.array(at)) - 1]).float(), dim=-1)


def _nll(model: LlavaForConditionalGeneration, states: torch.Tensor, tokens: Sequence[int], at: Sequence[int]) -> float:
    log_probs = _log_probs(model, states, at)
    return -float(log_probs[range(len(at)), [tokens[i] for i in at]].double().sum())
