"""A small model and small encoded samples, without any file: what tests of pure functions run on."""

import numpy as np

from lmmjax.config import LlavaConfig, TextConfig, VisionConfig
from lmmjax.data import Encoded

VISION = VisionConfig(width=16, ffn=24, layers=2, heads=2, image_size=16, patch_size=8, feature_layers=(2,))
TEXT = TextConfig(vocab=40, width=32, ffn=48, layers=2, heads=4, kv_heads=2, head_dim=8, context=64)
CONFIG = LlavaConfig(vision=VISION, text=TEXT, image_token=39)


def encoded(count: int, seed: int = 0, length: int = 16) -> Encoded:
    """Returns `count` random samples: four image tokens, some text, a two-token answer, unequal lengths."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 38, (count, length)).astype(np.int32)
    tokens[:, 1:5] = CONFIG.image_token
    lengths = rng.integers(10, length + 1, count).astype(np.int32)
    at = np.arange(length)
    return Encoded(
        tokens=np.where(at < lengths[:, None], tokens, 0),
        lengths=lengths,
        is_answer=(at >= lengths[:, None] - 2) & (at < lengths[:, None]),
        pixels=rng.standard_normal((count, 3, 16, 16)).astype(np.float32),
        kinds=tuple(("shape", "colour")[i % 2] for i in range(count)),
    )
