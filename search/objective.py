"""What a candidate is judged by: two compiled programs, in which drops and bits are data, serve the whole study.

The one prunes, once a candidate; the other predicts, once a batch. In one program the zeros would be put into
every batch's weights anew: for 16 rows of 64 tokens a fifth of the time.
"""

import functools
import math
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jaxtyping import Array, Int

from lmmjax import likelihood
from lmmjax.cache import empty_search_cache
from lmmjax.config import LlavaConfig
from lmmjax.data import Encoded
from lmmjax.likelihood import Batch, LogProbs, Result
from lmmjax.llava import Params
from lmmjax.plan import CacheFormat
from lmmjax.prune.transform import Ranks, masked
from search.space import Candidate, dense


def perplexity(result: Result) -> float:
    """Returns e to the mean negative log-likelihood, infinity where that is too large for a number."""
    return result.ppl if result.nll < 700 else math.inf


OBJECTIVES: dict[str, Callable[[Result], float]] = {
    "kl": lambda result: result.kl,
    "nll": lambda result: result.nll,
    "accuracy": lambda result: 1 - result.accuracy,
    "ppl": perplexity,
}
"""By name, what is made as small as possible. `ppl` counts all text tokens, the others those of the answers."""


class Evaluator:
    """Evaluates candidates on one set of samples against the dense model, whose predictions are computed once."""

    def __init__(
        self,
        config: LlavaConfig,
        params: Params,
        ranks: Ranks,
        form: CacheFormat,
        encoded: Encoded,
        *,
        batch: int = 32,
        tokens: str = "answer",
    ):
        self._config, self._params, self._ranks, self._form = config, params, ranks, form
        self._encoded = encoded
        self._batches = list(likelihood.batches(config, params, encoded, min(batch, len(encoded.kinds)), tokens))
        self._reference = list(self._predictions(dense(config.text.layers), ranks))

    def __call__(self, candidate: Candidate, ranks: Ranks | None = None) -> Result:
        """Returns the result of an allocation; weights go in the order of `ranks`, by default the search's."""
        predicted = self._predictions(candidate, ranks or self._ranks)
        triples = zip(self._batches, self._reference, predicted, strict=True)
        return likelihood.gather([_compare(*triple) for triple in triples], self._encoded)

    def _predictions(self, candidate: Candidate, ranks: Ranks) -> Iterator[LogProbs]:
        """Yields batch by batch: those of a whole set, a number a word of the vocabulary, are held once only."""
        drops, *bits = (np.asarray(array, np.int32) for array in candidate)
        params = pruned(self._params, ranks, drops)
        for batch in self._batches:
            yield _predict(self._config, self._form, params, *bits, batch)


pruned = jax.jit(masked)
"""`prune.masked` as a program: (params, ranks, drops (l, 7)) -> params with the zeros in place."""


@functools.partial(jax.jit, static_argnames=("config", "form"))
def _predict(
    config: LlavaConfig,
    form: CacheFormat,
    params: Params,
    key_bits: Int[Array, "l"],
    value_bits: Int[Array, "l"],
    batch: Batch,
) -> LogProbs:
    """Returns the predictions of one candidate on one batch. Traced once for all candidates and batches."""
    size, length = batch.x.shape[:2]
    cache = empty_search_cache(config.text, form, key_bits, value_bits, size, length)
    return likelihood.log_probs(config, params, cache, batch)


_compare = jax.jit(likelihood.compare)
