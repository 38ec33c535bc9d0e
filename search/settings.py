"""What decides where a search goes; a search is resumed only under the same settings."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from lmmjax.data import EASY_VQA
from lmmjax.errors import InputError

if TYPE_CHECKING:
    from lmmjax.config import TextConfig
    from lmmjax.plan import CacheFormat
    from search.space import Space

# The names alone, since the functions behind them take seconds to import: see search.objective and lmmjax.prune.
OBJECTIVES = ("kl", "nll", "accuracy", "ppl")
SCORES = ("magnitude", "wanda", "lognorm")


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
    group: int = 32
    window: int = 0
    calibration_samples: int = 128
    calibration_tokens: str = "all"
    search_samples: int = 256
    seed: int = 0

    def __post_init__(self):
        for name in ("calibration_samples", "search_samples"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')}: got {getattr(self, name)}, expected at least 1")
        if self.seed < 0:
            raise InputError(f"--seed: got {self.seed}, expected 0 or more")

    @property
    def tokens(self) -> str:
        """The tokens that KL, likelihood and perplexity count: all of the text for `ppl`, else the answers'."""
        return "text" if self.objective == "ppl" else "answer"

    @property
    def form(self) -> "CacheFormat":
        from lmmjax.plan import CacheFormat

        return CacheFormat(self.group, self.window)

    def space(self, text: "TextConfig") -> "Space":
        """Returns the space to search.

        Raises:
            InputError: a budget cannot be met by this model, or there is nothing to choose.
        """
        from search.budget import WeightBudget
        from search.cache_budget import CacheBudget
        from search.space import Space

        if self.context > text.context:
            raise InputError(f"--context: got {self.context}, expected at most the model's {text.context}")
        cache = CacheBudget(text, self.kv_budget, self.context, self.form)
        space = Space(WeightBudget(text, self.budget, self.box), cache, self.blocks)
        if not space.distributions:
            raise InputError("--budget, --kv-budget, --box: nothing is left to choose; give a budget below 1")
        return space


def default_out(model: str | None, budget: float) -> Path:
    """Returns where a search writes by default: runs/<model>-<budget>."""
    name = Path(model).resolve().name if model else "tiny"
    return Path("runs") / f"{name}-{budget:g}"
