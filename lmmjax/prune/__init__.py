"""One-shot pruning as functions of params: calibrate -> score -> allocate -> mask -> apply."""

from lmmjax.prune.masks import drop_lowest, keep_n_of_m, rank
from lmmjax.prune.replay import replay
from lmmjax.prune.scores import SCORES
from lmmjax.prune.transform import apply_masks, apply_plan, masked, prune, rank_model, uniform_drop

__all__ = [
    "SCORES",
    "apply_masks",
    "apply_plan",
    "drop_lowest",
    "keep_n_of_m",
    "masked",
    "prune",
    "rank",
    "rank_model",
    "replay",
    "uniform_drop",
]
