"""What allocations judge layers by: their weights, the statistics of their inputs, and the loss."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jaxtyping import Float

from lmmjax.calibrate.statistics import LayerStatistics
from lmmjax.config import LINEARS, TextConfig
from lmmjax.errors import InputError
from lmmjax.llava import Params


@dataclasses.dataclass(frozen=True)
class Evidence:
    """The dense model as allocations see it; they read only what they need.

    `layer` gives a decoder layer's params and may load them: rules ask once for each, in order, and keep none.
    `loss` is the mean loss with one layer's params replaced, over whatever samples the caller chose; `seed` is that of
    what a rule draws.
    """

    text: TextConfig
    sparsity: float
    layer: Callable[[int], Params]
    statistics: Sequence[LayerStatistics] = ()
    loss: Callable[[int, Params], float] | None = None
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.sparsity < 1:
            raise InputError(f"sparsity: got {self.sparsity:g}, expected the share to drop, 0 <= share < 1")

    @property
    def keep(self) -> float:
        return 1 - self.sparsity

    def layers(self) -> Iterator[Params]:
        """Returns the layers' params one after the other, each asked for when it is its turn."""
        return (self.layer(index) for index in range(self.text.layers))

    def trait(self, name: str) -> Float[np.ndarray, "l"]:
        """Returns one of the layers' traits, a number a layer; NaN where there were no such tokens."""
        return np.array([float(getattr(stats.traits, name)) for stats in self.statistics])


def over_linears(values: Float[np.ndarray, "l"]) -> Float[np.ndarray, "l 7"]:
    """Returns a number a layer as one a linear."""
    return np.repeat(values[:, None], len(LINEARS), axis=1)


def require_numbers(rule: str, what: str, values: Float[np.ndarray, "l"]) -> None:
    """Raises InputError where a layer has no finite value: it would leave no number of any other layer's share."""
    if missing := np.flatnonzero(~np.isfinite(values)).tolist():
        raise InputError(
            f"allocation {rule}: got no {what} of layers {', '.join(map(str, missing))}, expected a finite number;"
            " calibrate on longer or other samples, or use another allocation"
        )
