"""How much each weight matters: scores from the weights and the statistics of what they are fed.

Weights are (in, out), so the papers' "row of an output" is a column here. All in float32.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from lmmjax.calibrate.statistics import LinearStatistics
from lmmjax.errors import InputError


class Score(NamedTuple):
    """A rule that gives each weight its worth, and what it is compared with: `over` its "output" or the "matrix".

    `gradients` says whether the rule reads those; all else needs mean squares alone.
    """

    rule: Callable[[Float[Array, "in out"], LinearStatistics], Float[Array, "in out"]]
    over: str = "output"
    gradients: bool = False


def magnitude(weight: Float[Array, "in out"], stats: LinearStatistics) -> Float[Array, "in out"]:
    """Returns |W|; the inputs do not matter."""
    return jnp.abs(weight.astype(jnp.float32))


def wanda(weight: Float[Array, "in out"], stats: LinearStatistics) -> Float[Array, "in out"]:
    """Returns |W| times the root mean square of the input. Source: arXiv:2306.11695, equation 1."""
    return jnp.abs(weight.astype(jnp.float32)) * jnp.sqrt(stats.x_sq)[:, None]


def wanda_cumulative(weight: Float[Array, "in out"], stats: LinearStatistics) -> Float[Array, "in out"]:
    """Returns the sum of the output's wanda scores up to the weight's own, lowest first, over the sum of them all.

    What is lowest over the matrix is then the same share of every output's sum. The source searches for that share
    by bisection, to within .001 of the sparsity; by rank it is exact. Equal scores add up in the inputs' order.

    Source: arXiv:2306.11695, `use_variant` in its release.
    """
    score = wanda(weight, stats)
    order = jnp.argsort(score, axis=0, stable=True)
    # Sorted, each step is at least the mean of those before it: float32's error is far too small to turn two round.
    sums = jnp.cumsum(jnp.take_along_axis(score, order, axis=0), axis=0)
    return jnp.put_along_axis(jnp.zeros_like(score), order, _per(sums, sums[-1]), axis=0, inplace=False)


def ria(weight: Float[Array, "in out"], stats: LinearStatistics) -> Float[Array, "in out"]:
    """Returns (|W| / sum of its output's |W| + |W| / sum of its input's |W|) * x_sq^(1/4).

    Source: RIA, openreview.net/forum?id=Tr0lPx9woF, a = 0.5; its release compares over the matrix. A weight whose
    row or column is all zero scores 0 in that term.
    """
    size = jnp.abs(weight.astype(jnp.float32))
    relative = _per(size, size.sum(0, keepdims=True)) + _per(size, size.sum(1, keepdims=True))
    return relative * (stats.x_sq**0.25)[:, None]


def lognorm(weight: Float[Array, "in out"], stats: LinearStatistics) -> Float[Array, "in out"]:
    """Returns log(1 + |W| / norm of its output's weights + |W| / norm of its input's) * x_sq^(1/4).

    Source: arXiv:2507.20613. A weight whose row or column is all zero scores 0 in that term.
    """
    size = jnp.abs(weight.astype(jnp.float32))
    norms = (jnp.linalg.norm(size, axis=axis, keepdims=True) for axis in (0, 1))
    return jnp.log1p(sum(_per(size, norm) for norm in norms)) * (stats.x_sq**0.25)[:, None]


def pruner_zero(weight: Float[Array, "in out"], stats: LinearStatistics) -> Float[Array, "in out"]:
    """Returns |W W| times the gradient's size, scaled to run from 0 to 1 over the matrix.

    Source: arXiv:2406.02924. Where the gradient is the same everywhere, W² alone decides; the source divides by 0.

    Raises:
        InputError: the statistics hold no gradient.
    """
    if stats.gradient is None:
        raise InputError(
            "gradient: got None, expected the size of the loss's gradient by every weight; "
            "calibrate with gradients, or choose a score that reads none"
        )
    gradient = stats.gradient.astype(jnp.float32)
    low, span = gradient.min(), jnp.ptp(gradient)
    return weight.astype(jnp.float32) ** 2 * jnp.where(span == 0, 1, _per(gradient - low, span))


SCORES: dict[str, Score] = {
    "magnitude": Score(magnitude),
    "wanda": Score(wanda),
    "wanda-cumulative": Score(wanda_cumulative, over="matrix"),
    "ria": Score(ria, over="matrix"),
    "lognorm": Score(lognorm),
    "pruner-zero": Score(pruner_zero, gradients=True),
}


def _per(size: Float[Array, "..."], total: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns size / total, and 0 where there is nothing in total."""
    return size / jnp.where(total == 0, 1, total)
