"""OWL: layers with more outliers among their Wanda scores keep more."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lmmjax.calibrate.statistics import LayerStatistics, LinearStatistics
from lmmjax.linears import kernels_of
from lmmjax.llava import Params
from lmmjax.prune.allocations.evidence import Evidence, over_linears
from lmmjax.prune.allocations.shares import unit_range
from lmmjax.prune.scores import wanda


def owl(evidence: Evidence, m: float = 5.0, lamda: float = 0.08) -> Float[np.ndarray, "l 7"]:
    """Returns sparsities whose densities are the layers' shares of outliers, mapped to a range of 2 lambda.

    density_l = 2 lambda (D_l - min D) / (max D - min D), moved so that its mean is the share to keep. All layers have
    as many weights, so a plain mean is the budget's. M and lambda are those of the published commands for Llama.

    Source: OWL, arXiv:2310.05175, and its published code for what "a layer" is: see `outliers`.
    """
    layers = zip(evidence.layers(), evidence.statistics, strict=True)
    density = unit_range(np.array([outliers(layer, stats, m) for layer, stats in layers])) * 2 * lamda
    return over_linears(1 - (density - density.mean() + evidence.keep))


def outliers(layer: Params, stats: LayerStatistics, m: float) -> float:
    """Returns the percentage of a layer's Wanda scores above m times their mean.

    One mean over the scores of all seven linears, as in the published code, and not one a linear: scores are not made
    comparable first, so the linears with the largest inputs give most outliers.
    """
    weights = kernels_of(layer)
    size = sum(weight.size for weight in weights.values())
    sums = (np.asarray(_sums(weight, stats[name].x_sq)) for name, weight in weights.items())
    limit = jnp.float32(m * sum(part.sum(dtype=np.float64) for part in sums) / size)
    counts = (np.asarray(_above(weight, stats[name].x_sq, limit)) for name, weight in weights.items())
    return 100 * sum(int(part.sum()) for part in counts) / size


# Sums of one input each are added up in float64: 200 million scores in one float32 number would lose digits. Summing
# along memory takes a ninth of the time on a CPU.
@jax.jit
def _sums(weight: Float[Array, "in out"], x_sq: Float[Array, "in"]) -> Float[Array, "in"]:
    return wanda(weight, LinearStatistics(x_sq)).sum(axis=1)


@jax.jit
def _above(weight: Float[Array, "in out"], x_sq: Float[Array, "in"], limit: Float[Array, ""]) -> Int[Array, "in"]:
    return (wanda(weight, LinearStatistics(x_sq)) > limit).sum(axis=1)
