"""Uniform: the same sparsity everywhere."""

import numpy as np
from jaxtyping import Float

from lmmjax.prune.allocations.evidence import Evidence, over_linears


def uniform(evidence: Evidence) -> Float[np.ndarray, "l 7"]:
    """Returns the target for every linear."""
    return over_linears(np.full(evidence.text.layers, evidence.sparsity))
