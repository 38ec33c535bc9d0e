"""DAS: layers whose output tokens differ more among themselves keep more."""

import numpy as np
from jaxtyping import Float

from lmmjax.prune.allocations.evidence import Evidence, over_linears, require_numbers
from lmmjax.prune.allocations.shares import capped


def das(evidence: Evidence, slack: float = 0.1) -> Float[np.ndarray, "l 7"]:
    """Returns sparsities that leave each layer weights in proportion to its diversity, at most target + slack.

    s_l = (s_visual + s_text + s_cross) / 3, each a mean of 1 - cos over pairs of the layer's output tokens; of what
    the samples have, where they lack a kind of token. Every layer keeps 1 - target - slack, and what is left of the
    budget is dealt out in proportion to s.

    Source: diversity-aware sparsity of TAMP, arXiv:2504.09897. Its published code judges each linear by the linear's
    own outputs, and within a kind of token passes over pairs of negative cosine; here a layer is judged by what it
    hands to the next, over all pairs.
    """
    spreads = np.stack([evidence.trait(f"{tokens}_spread") for tokens in ("visual", "text", "cross")])
    present = np.isfinite(spreads)
    diversity = np.where(present, spreads, 0).sum(axis=0) / np.maximum(present.sum(axis=0), 1)
    require_numbers("das", "spread of tokens", np.where(present.any(axis=0), diversity, np.nan))
    return over_linears(capped(np.abs(diversity), evidence.sparsity, slack))
