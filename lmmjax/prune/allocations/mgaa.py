"""MGAA: sublayers that turn the stream more keep more, by a softmax over all of them."""

import math

import numpy as np
from jaxtyping import Float

from lmmjax.config import LINEARS
from lmmjax.linears import SUBLAYERS
from lmmjax.prune.allocations.evidence import Evidence, require_numbers


def mgaa(evidence: Evidence, temperature: float = 1.0) -> Float[np.ndarray, "l 7"]:
    """Returns sparsities whose densities are a softmax of the importances of all attentions and MLPs together.

    I_s = 1 - mean cos(input, output) of sublayer s, the stream before and behind it; p = softmax(I / temperature);
    density_s = keep * p_s / mean p, the mean weighted by parameters.

    Source: MGAA, arXiv:2507.03294, its allocation among sublayers. What it says of low-rank factors is read for pruning
    as follows. Shares are densities, not numbers of parameters, so that sublayers of unlike sizes and like importance
    are pruned alike; the temperature is 1; a sublayer's matrices are pruned alike, since the paper divides
    a sublayer's share by the energy of singular values, which pruning does not cut.
    """
    drift = np.stack([evidence.trait(f"{part}_drift") for part in SUBLAYERS], axis=1)
    require_numbers("mgaa", "drift", drift.sum(axis=1))
    share = np.exp((drift - drift.max()) / temperature)
    size = [sum(math.prod(evidence.text.linear_shape(name)) for name in names) for names in SUBLAYERS.values()]
    density = evidence.keep * share / np.average(share, axis=1, weights=size).mean()
    column = [part for name in LINEARS for part, names in enumerate(SUBLAYERS.values()) if name in names]
    return 1 - density[:, column]
