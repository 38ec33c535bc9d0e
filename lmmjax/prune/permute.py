"""Channel permutation for N:M: which inputs share a block, so that a block seldom has to drop what matters.

As RIA does it: inputs are dealt to blocks by their summed scores, then one input of every block at a time is dealt
anew, by linear sum assignment. Each linear gets an order of its own. Source: openreview.net/forum?id=Tr0lPx9woF.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from scipy.optimize import linear_sum_assignment

from lmmjax.prune.masks import keep_n_of_m


def permutation(score: Float[Array, "in out"], n: int, m: int, rounds: int = 1) -> Int[np.ndarray, "in"]:
    """Returns the inputs in the order in which each m of them make a block; as they were, if no order retains more.

    A round deals all m inputs of the blocks anew, one after the other; the source makes one, and rounds end once
    nothing moves. A round takes inputs² / m * outputs operations, and m assignments of inputs / m to as many blocks:
    4096 x 4096 at 2:4 took 17 s of CPU time and 0.9 GiB in all, 11008 x 4096 took 152 s and 1.5 GiB.

    Raises:
        InputError: n > m, or m does not divide the inputs.
    """
    inputs = score.shape[0]
    unmoved = np.arange(inputs)
    before = retained(score, keep_n_of_m(score, n, m))
    if m in (n, inputs):  # nothing is dropped, or all blocks are one
        return unmoved
    order = _settled(score, _dealt(np.asarray(score.sum(1)), m), n, rounds).reshape(-1)
    return order if retained(score, keep_n_of_m_permuted(score, n, m, order)) > before else unmoved


def keep_n_of_m_permuted(
    score: Float[Array, "in out"], n: int, m: int, order: Int[Array | np.ndarray, "in"]
) -> Bool[Array, "in out"]:
    """Returns the mask, inputs as they were, that keeps the n highest of each m that follow each other in `order`.

    Raises:
        InputError: n > m, or m does not divide the inputs.
    """
    keep = keep_n_of_m(score[order], n, m)
    return jnp.zeros_like(keep).at[order].set(keep, unique_indices=True)


def retained(score: Float[Array, "in out"], mask: Bool[Array, "in out"]) -> float:
    """Returns the sum of the scores that a mask keeps: what a permutation is to raise."""
    return float(np.sum(np.asarray(score), where=np.asarray(mask), dtype=np.float64))


def _dealt(worth: Float[np.ndarray, "in"], m: int) -> Int[np.ndarray, "block m"]:
    """Returns inputs dealt to blocks by rising worth, every other turn backwards: all blocks get much the same."""
    turns = np.argsort(worth, kind="stable").reshape(m, -1)
    turns[1::2] = turns[1::2, ::-1]
    return turns.T


def _settled(
    score: Float[Array, "in out"], blocks: Int[np.ndarray, "block m"], n: int, rounds: int
) -> Int[np.ndarray, "block m"]:
    """Returns blocks after these rounds, or as soon as a round moves nothing."""
    for _ in range(rounds):
        last = blocks
        for place in range(blocks.shape[1]):
            blocks = _reassigned(score, blocks, place, n)
        if (blocks == last).all():
            break
    return blocks


def _reassigned(
    score: Float[Array, "in out"], blocks: Int[np.ndarray, "block m"], place: int, n: int
) -> Int[np.ndarray, "block m"]:
    """Returns blocks whose inputs at one place changed seats such that together they retain the most."""
    moving, rest = blocks[:, place], np.delete(blocks, place, axis=1)
    worth = np.asarray(_worth(score, moving, rest, n), np.float64)
    chosen = linear_sum_assignment(worth, maximize=True)[1]
    if worth[np.arange(len(blocks)), chosen].sum() <= worth.trace():
        return blocks
    moved = blocks.copy()
    moved[:, place] = moving[chosen]
    return moved


@functools.partial(jax.jit, static_argnames="n")
def _worth(
    score: Float[Array, "in out"], moving: Int[Array, "block"], rest: Int[Array, "block m-1"], n: int
) -> Float[Array, "block block"]:
    """Returns what block i retains if input j joins it, short of what it retains anyway.

    The n - 1 highest of the rest stay whoever joins. The last seat goes to the joining one or to the rest's n-th,
    so no block has to be sorted for any pair.
    """
    joining, rivals = score[moving], _highest(score, rest, n)
    # Block by block: the outputs of all pairs at once would be 16 GB for 4096 x 4096.
    return jax.lax.map(lambda rival: jnp.maximum(joining, rival).sum(1), rivals)


def _highest(score: Float[Array, "in out"], rest: Int[Array, "block m-1"], n: int) -> Float[Array, "block out"]:
    """Returns the n-th highest of each block's inputs, by insertion: XLA's sort of such short columns is slow."""
    best = [jnp.full((rest.shape[0], score.shape[1]), -jnp.inf, score.dtype)] * n
    for inputs in rest.T:
        rising = score[inputs]
        for i, above in enumerate(best):
            best[i], rising = jnp.maximum(above, rising), jnp.minimum(above, rising)
    return best[-1]
