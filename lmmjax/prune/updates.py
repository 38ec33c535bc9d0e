"""Weight updates: those of a linear's weights that stay make up for those that go."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Bool, Float

from lmmjax.errors import InputError
from lmmjax.prune import admm, sparsegpt
from lmmjax.prune.masks import keep_n_of_m

Prepared = Any
"""What a method makes of a gram matrix: a pytree of its own, for all linears that have the same inputs."""
Pruned = tuple[Float[Array, "in out"], Bool[Array, "in out"]]
"""Weights, zero where they do not stay, and which do."""


class Update(NamedTuple):
    """A method. All arithmetic is in float32; weights come back in the dtype in which they went in.

    `prepare` takes the gram matrix and the layer's name for errors, once for all linears with the same inputs. `repair`
    takes a mask from anywhere, `by_count` and `by_pattern` choose their own: see `choose`.
    """

    prepare: Callable[[Float[Array, "in in"], str], Prepared]
    repair: Callable[[Float[Array, "in out"], Prepared, Bool[Array, "in out"]], Float[Array, "in out"]]
    by_count: Callable[[Float[Array, "in out"], Prepared, int], Pruned]
    by_pattern: Callable[[Float[Array, "in out"], Prepared, tuple[int, int]], Pruned]

    def choose(
        self,
        weight: Float[Array, "in out"],
        prepared: Prepared,
        drop: int | None = None,
        pattern: tuple[int, int] | None = None,
    ) -> Pruned:
        """Returns repaired weights, and which stay: all but exactly `drop` times the outputs, or N of each M inputs.

        A pattern takes the place of the count.

        Raises:
            InputError: neither is given, or what is given does not fit the weights.
        """
        if pattern is not None:
            jax.eval_shape(functools.partial(keep_n_of_m, n=pattern[0], m=pattern[1]), weight)
            return self.by_pattern(weight, prepared, pattern)
        if drop is None or not 0 <= drop <= len(weight):
            raise InputError(f"drop: got {drop} for {len(weight)} inputs, expected from 0 to all of them, or a pattern")
        return self.by_count(weight, prepared, int(drop))


UPDATES: dict[str, Update] = {
    "sparsegpt": Update(sparsegpt.prepare, sparsegpt.repair, sparsegpt.choose, sparsegpt.choose_pattern),
    "admm": Update(admm.prepare, admm.repair, admm.choose, admm.choose_pattern),
}
