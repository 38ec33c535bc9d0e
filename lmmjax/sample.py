"""The next token from logits: greedy, or drawn under temperature, top-k and top-p, all of them data."""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int, Key


class Sampling(struct.PyTreeNode):
    """How tokens are drawn. Every field is traced: one compiled program serves all settings.

    `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 filter nothing.
    """

    temperature: Float[Array, ""] | float = 0.0
    top_k: Int[Array, ""] | int = 0
    top_p: Float[Array, ""] | float = 1.0

    def typed(self) -> "Sampling":
        """Returns the same settings as fresh arrays, whose dtypes do not depend on how a number was written."""
        return Sampling(
            jnp.array(self.temperature, jnp.float32),
            jnp.array(self.top_k, jnp.int32),
            jnp.array(self.top_p, jnp.float32),
        )


GREEDY = Sampling()


def sample(logits: Float[Array, "b v"], keys: Key[Array, "b"], sampling: Sampling) -> Int[Array, "b"]:
    """Returns one token a row; each row draws with its own key, so a batch changes nobody's answer."""
    greedy = jnp.argmax(logits, -1).astype(jnp.int32)
    return jax.lax.cond(sampling.temperature > 0, lambda: _draw(logits, keys, sampling), lambda: greedy)


def _draw(logits: Float[Array, "b v"], keys: Key[Array, "b"], sampling: Sampling) -> Int[Array, "b"]:
    scaled = logits / jnp.maximum(sampling.temperature, 1e-6)
    filters = (sampling.top_k > 0) | (sampling.top_p < 1)
    # Sorting a vocabulary costs more than the rest of the draw, so it is skipped when nothing filters.
    floor = jax.lax.cond(filters, lambda: _floor(scaled, sampling), lambda: jnp.full_like(scaled[:, :1], -jnp.inf))
    kept = jnp.where(scaled >= floor, scaled, -jnp.inf)
    return jax.vmap(jax.random.categorical)(keys, kept).astype(jnp.int32)


def _floor(scaled: Float[Array, "b v"], sampling: Sampling) -> Float[Array, "b 1"]:
    """Returns the least logit that stays in the draw: among the k best, of these the fewest whose shares reach p.

    Equal logits stay or go together. Source: nucleus sampling, arXiv:1904.09751, section 3.1.
    """
    best = -jnp.sort(-scaled, -1)
    rank = jnp.arange(best.shape[-1])
    best = jnp.where((rank < sampling.top_k) | (sampling.top_k == 0), best, -jnp.inf)
    share = jax.nn.softmax(best, -1)
    before = jnp.cumsum(share, -1) - share
    stays = ((before < sampling.top_p) & (best > -jnp.inf)) | (rank == 0)
    return jnp.min(jnp.where(stays, best, jnp.inf), -1, keepdims=True)
