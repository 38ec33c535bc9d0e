"""What decides where a search goes; a search is resumed only under the same settings."""

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lmmjax.data import EASY_VQA
from lmmjax.errors import InputError

if TYPE_CHECKING:
    from lmmjax.config import LlavaConfig
    from lmmjax.plan import CacheFormat
    from search.space import Space

# The names alone, since the functions behind them take seconds to import: see search.objective and lmmjax.prune.
OBJECTIVES = ("kl", "nll", "accuracy", "ppl")
SCORES = ("magnitude", "wanda", "wanda-cumulative", "ria", "lognorm")
"""Those that read nothing but mean squares: a search takes no gradients."""
BASELINES = ("magnitude", "wanda", "lognorm")
"""Those that a search's result is compared with, beside its own."""
ALLOCATIONS = ("owl", "alphapruning", "das", "mgaa")
"""Those that can be starts: they need weights and statistics alone, which a search has."""


class Effort(NamedTuple):
    """How much a search does, in the numbers of the command line."""

    trials: int
    calibration_samples: int
    search_samples: int
    report_samples: int


SMALL = Effort(trials=100, calibration_samples=128, search_samples=256, report_samples=1000)
EFFORTS = {
    20_000_000: SMALL,
    200_000_000: Effort(trials=80, calibration_samples=64, search_samples=96, report_samples=400),
    math.inf: Effort(trials=60, calibration_samples=32, search_samples=48, report_samples=200),
}
"""By the most prunable weights that it is for: what is done where the command leaves it open.

A token costs two operations a weight, and nearly all tokens of a search are those of trials x search samples. The
second effort keeps a search with 100 million weights under a quarter of an hour on two cores.
"""


def _default_form() -> "CacheFormat":
    from lmmjax.plan import CacheFormat

    return CacheFormat()


@dataclasses.dataclass(frozen=True)
class Settings:
    """The command's arguments that matter to the result, in the units of the command line."""

    model: str
    budget: float
    kv_budget: float
    context: int
    data: str = EASY_VQA
    blocks: str = "layer"
    box: float = 0.15
    objective: str = "kl"
    score: str = "lognorm"
    form: "CacheFormat" = dataclasses.field(default_factory=_default_form)
    calibration_samples: int = SMALL.calibration_samples
    calibration_tokens: str = "all"
    search_samples: int = SMALL.search_samples
    seed: int = 0
    sensitivity: str | None = None
    allocations: str | None = None

    def __post_init__(self):
        for name in ("calibration_samples", "search_samples"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')}: got {getattr(self, name)}, expected at least 1")
        if self.seed < 0:
            raise InputError(f"--seed: got {self.seed}, expected 0 or more")
        if self.form.rotate_values == "folded" and self.budget != 1:
            raise InputError(
                "--rotate-values: folded fills pruned weights of v and o again; use online, or keep all by --budget 1"
            )

    @property
    def tokens(self) -> str:
        """The tokens that KL, likelihood and perplexity count: all of the text for `ppl`, else the answers'."""
        return "text" if self.objective == "ppl" else "answer"

    @property
    def record(self) -> dict[str, Any]:
        """The settings as plain values, the cache's format field by field: what a study and a report keep."""
        return {**{name: value for name, value in vars(self).items() if name != "form"}, **vars(self.form)}

    def space(self, config: "LlavaConfig") -> "Space":
        """Returns the space to search.

        Raises:
            InputError: a budget cannot be met by this model, or there is nothing to choose.
        """
        from lmmjax.prune.budget import WeightBudget
        from search.cache_budget import CacheBudget
        from search.space import Space

        text, images = config.text, config.image_tokens
        if self.context > text.context:
            raise InputError(f"--context: got {self.context}, expected at most the model's {text.context}")
        cache = CacheBudget(text, self.kv_budget, self.context, self.form, images)
        space = Space(WeightBudget(text, self.budget, self.box), cache, self.blocks)
        if not space.distributions:
            raise InputError("--budget, --kv-budget, --box: nothing is left to choose; give a budget below 1")
        return space


def effort(weights: int) -> Effort:
    """Returns what a search does by default to a model with so many prunable weights."""
    return next(effort for most, effort in EFFORTS.items() if weights <= most)


def default_out(model: str | None, budget: float) -> Path:
    """Returns where a search writes by default: runs/<model>-<budget>."""
    name = Path(model).resolve().name if model else "tiny"
    return Path("runs") / f"{name}-{budget:g}"
