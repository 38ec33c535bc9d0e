"""How judgements of layers become shares: spread over a range, or in proportion above a floor."""

import numpy as np
from jaxtyping import Float


def unit_range(values: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    """Returns values mapped linearly so that the lowest is 0 and the highest 1; all 0 where they are alike.

    Alike is also what differs by rounding only: the map would blow that up to the whole range.
    """
    low, high = values.min(), values.max()
    if high - low <= 1e-6 * max(abs(low), abs(high)):
        return np.zeros_like(values)
    return (values - low) / (high - low)


def capped(importance: Float[np.ndarray, "n"], sparsity: float, slack: float) -> Float[np.ndarray, "n"]:
    """Returns sparsities of this mean that leave weights in proportion to importance, at most sparsity + slack."""
    return 1 - proportional(importance, 1 - sparsity, 1 - min(1, sparsity + slack))


def proportional(importance: Float[np.ndarray, "n"], mean: float, floor: float) -> Float[np.ndarray, "n"]:
    """Returns shares of the given mean in proportion to importances >= 0, above a floor that all get first.

    What would raise a share above 1 goes to the others, again in proportion; what no importance asks for goes to
    those that are not full in equal parts. So a share is min(1, floor + t * importance), with one t for all.

    Source: ECoFLaP's published code (arXiv:2310.02998), which counts parameters of equal groups instead of shares.
    """
    shares = np.full(importance.shape, min(floor, mean))
    for _ in shares:  # every round spends the rest or fills one share at least
        rest = mean * shares.size - shares.sum()
        open_ = shares < 1
        weights = np.where(open_, importance, 0.0)
        weights = weights if weights.any() else open_.astype(float)
        if rest <= 0 or not weights.any():
            break
        shares = np.minimum(1, shares + rest * weights / weights.sum())
    return shares
