"""What our KV cache is compared with: known schemes as settings of our own cache, and what other programs predicted.

Hugging Face's quantized cache, run by transformers and optimum-quanto, is in kv_peers_torch; its log-probabilities are
judged here, by the definitions of lmmjax.likelihood. KIVI's and the plain per-token scheme need no code: both are
CacheFormats.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
from jaxtyping import Float

from lmmjax.config import TextConfig
from lmmjax.data import Encoded
from lmmjax.likelihood import Sums
from lmmjax.plan import CacheFormat

Predicted = Float[np.ndarray, "n v"]
"""Natural log-probabilities of one sample's answer tokens, in order."""


def kivi(group: int = 32, residual: int = 0, **settings: Any) -> CacheFormat:
    """Returns KIVI's scheme: keys a scale a channel and `group` tokens, values a scale a token and `group` channels.

    At least `residual` of the latest tokens are exact, a multiple of the group (128 in the paper). KIVI flushes keys
    `residual` at a time, so between 0 and residual of them are exact at a moment; ours go a group at a time.
    Source: KIVI, arXiv:2402.02750, section 3.
    """
    return CacheFormat(group=group, window=residual, **settings)


def per_token(text: TextConfig, **settings: Any) -> CacheFormat:
    """Returns plain per-token rounding: one scale and zero a token, kv head and side over the whole head.

    Keys are rounded after RoPE. That is bits + 32 / head_dim a value, with float16 metadata.
    """
    return CacheFormat(group=text.head_dim, key_axis="channels", keys="after_rope", **settings)


def compare(encoded: Encoded, reference: Iterable[Predicted], predicted: Iterable[Predicted]) -> Sums:
    """Returns what `likelihood.compare` would for these samples' answer tokens, in NumPy and float64.

    KL is in nats, summed over the sample's answer tokens, from the reference to the predictions; a sample is correct
    if every answer token is the likeliest. `likelihood.gather([sums], encoded)` makes the means.

    Raises:
        ValueError: samples and predictions are not equally many, or a sample's not one a token of its answer.
    """
    rows = zip(encoded.tokens, encoded.is_answer, reference, predicted, strict=True)
    judged = zip(*(_judge(tokens[wanted], *both) for tokens, wanted, *both in rows), strict=True)
    columns: list[Any] = [np.array(column) for column in judged]
    return Sums(*columns)


def _judge(targets: np.ndarray, reference: Predicted, predicted: Predicted) -> tuple[float, float, int, bool]:
    """Returns one sample's sums, in the order of `Sums`."""
    if not len(targets) == len(reference) == len(predicted):
        raise ValueError(f"predictions: got {len(reference)} and {len(predicted)}, expected {len(targets)} tokens'")
    reference, predicted = reference.astype(np.float64), predicted.astype(np.float64)
    kl = np.sum(np.exp(reference) * (reference - predicted))
    nll = -np.sum(predicted[np.arange(len(targets)), targets])
    return float(kl), float(nll), len(targets), bool((predicted.argmax(-1) == targets).all())
