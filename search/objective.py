"""What a candidate is judged by: one compiled program, in which drops and bits are data, serves the whole study."""

from collections.abc import Callable

import jax
from jaxtyping import Array, Int

from lmmjax import evaluate
from lmmjax.cache import empty_search_cache
from lmmjax.config import LlavaConfig
from lmmjax.data import Encoded
from lmmjax.evaluate import Batch, LogProbs, Result
from lmmjax.llava import Params
from lmmjax.plan import CacheFormat
from lmmjax.prune import masked
from lmmjax.prune.transform import Ranks
from search.space import Candidate, dense

OBJECTIVES: dict[str, Callable[[Result], float]] = {
    "kl": lambda result: result.kl,
    "nll": lambda result: result.nll,
    "accuracy": lambda result: 1 - result.accuracy,
    "ppl": lambda result: result.ppl,
}
"""By name, what is made as small as possible. `ppl` counts all text tokens, the others those of the answers."""


class Evaluator:
    """Evaluates candidates on one set of samples against the dense model, whose predictions are computed once.

    `traces` counts how often the program was traced: once, whatever the candidates.
    """

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
        self.traces = 0
        self._config, self._params, self._ranks, self._form = config, params, ranks, form
        self._encoded = encoded
        self._batches = list(evaluate.batches(config, params, encoded, min(batch, len(encoded.kinds)), tokens))
        self._predict, self._compare = jax.jit(self._traced), jax.jit(evaluate.compare)
        self._reference = self._run(dense(config.text.layers), ranks)

    def __call__(self, candidate: Candidate, ranks: Ranks | None = None) -> Result:
        """Returns the result of an allocation; weights go in the order of `ranks`, by default the search's."""
        predicted = self._run(candidate, ranks or self._ranks)
        triples = zip(self._batches, self._reference, predicted, strict=True)
        return evaluate.gather([self._compare(*triple) for triple in triples], self._encoded)

    def _run(self, candidate: Candidate, ranks: Ranks) -> list[LogProbs]:
        return [self._predict(self._params, ranks, *candidate, batch) for batch in self._batches]

    def _traced(
        self,
        params: Params,
        ranks: Ranks,
        drops: Int[Array, "l 7"],
        key_bits: Int[Array, "l"],
        value_bits: Int[Array, "l"],
        batch: Batch,
    ) -> LogProbs:
        self.traces += 1
        size, length = batch.x.shape[:2]
        cache = empty_search_cache(self._config.text, self._form, key_bits, value_bits, size, length)
        return evaluate.log_probs(self._config, masked(params, ranks, drops), cache, batch)
