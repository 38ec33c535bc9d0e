"""95% intervals of what is measured on a sample: Wilson's for a share, the bootstrap's for means and differences."""

import math
from collections.abc import Iterator

import numpy as np
from jaxtyping import Int
from numpy.typing import ArrayLike

Interval = tuple[float, float]

Z = 1.959964
"""The normal distribution's 97.5% quantile."""


def wilson(successes: int, n: int) -> Interval:
    """Returns the interval of a share, sound near 0 and 1 too. Source: Wilson 1927, JASA 22, 209."""
    share, spread = successes / n, Z * Z / n
    centre = (share + spread / 2) / (1 + spread)
    half = Z / (1 + spread) * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap(numerators: ArrayLike, denominators: ArrayLike | None = None, seed: int = 0) -> Interval:
    """Returns the interval of a mean, or of a ratio of two sums, over samples drawn anew 2000 times.

    For a paired difference give the samples' differences. Source: Efron 1979, Annals of Statistics 7, 1.
    """
    above = np.asarray(numerators, float)
    below = np.ones(len(above)) if denominators is None else np.asarray(denominators, float)
    with np.errstate(invalid="ignore"):  # a sample can be infinite; the interval is NaN then
        ratios = [(counts @ above) / (counts @ below) for counts in resamples(len(above), seed)]
        low, high = np.quantile(np.concatenate(ratios), [0.025, 0.975])
    return float(low), float(high)


def resamples(n: int, seed: int) -> Iterator[Int[np.ndarray, "draws n"]]:
    """Yields how often each of n samples is drawn, 100 draws at a time, 2000 in all; the same for the same seed."""
    rng = np.random.default_rng(seed)
    for _ in range(20):
        yield rng.multinomial(n, np.full(n, 1 / n), size=100)
