"""The model's loss on samples with one layer replaced, for layers asked for in order: what is before them is kept."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lmmjax import llava
from lmmjax.calibrate import walk
from lmmjax.calibrate.tokens import Rows
from lmmjax.config import LlavaConfig
from lmmjax.layered import Layered
from lmmjax.layers import RMSNorm
from lmmjax.llava import Params


def losses(config: LlavaConfig, outer: Params, rows: Rows) -> Float[Array, "b"]:
    """Returns each row's mean negative log-likelihood of its text, from the last layer's output; 0 without text."""
    states = jnp.asarray(RMSNorm(config.text.eps).apply({"params": outer["text"]["norm"]}, rows.x))
    log_probs = jax.nn.log_softmax(llava.logits(config, outer, states[:, :-1]))
    nll = -jnp.take_along_axis(log_probs, rows.tokens[:, 1:, None], axis=-1, mode="clip")[..., 0]
    counted = (rows.valid & ~rows.visual)[:, 1:]
    return jnp.where(counted, nll, 0).sum(1) / jnp.maximum(counted.sum(1), 1)


class Loss:
    """The samples' mean of the mean negative log-likelihood of their text. Layers must not be asked for backwards."""

    def __init__(self, model: Layered, rows: list[Rows]):
        self._model, self._rows, self._at = model, rows, 0
        self._head = jax.jit(losses, static_argnums=0)

    def __call__(self, index: int, layer: Params) -> float:
        """Returns the loss with these parameters in the place of a layer's."""
        text = self._model.config.text
        assert index >= self._at, f"layer {index} is behind layer {self._at}, up to which the samples have moved"
        while self._at < index:
            walk.move(text, self._model.layer(self._at), self._rows)
            self._at += 1
        rows = list(self._rows)
        walk.move(text, layer, rows)
        for later in range(index + 1, text.layers):
            walk.move(text, self._model.layer(later), rows)
        sums = [np.asarray(self._head(self._model.config, self._model.outer, batch)) for batch in rows]
        return float(np.concatenate(sums)[self._real].mean())

    @property
    def _real(self) -> np.ndarray:
        return np.concatenate([np.asarray(batch.valid.any(1)) for batch in self._rows])
