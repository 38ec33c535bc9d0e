"""Which format a linear is packed in: what is wished for, or the smallest that its zeros allow."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from kernels.weights import Matrix, WeightFormat, encode, encode_table
from lmmjax.errors import InputError
from lmmjax.orders import Order

PATTERNS = ("1:4", "2:4", "4:8", "8:16")
"""What a kernel's zeros are tried for without being asked."""
GROUPS = {8: None, 4: 64}
"""Inputs that share a scale, by the bits of a code, where nothing is asked; None: a whole row."""


EMBEDDING, HEAD = "text.embedding", "text.lm_head.kernel"
"""Leaves that make the logits: the first where a model's head is tied to its embeddings."""


class Wish(NamedTuple):
    """What is asked for: "auto" or a kind of `WeightFormat`; bits (None: the floats stay as they are); a group.

    `head` are the bits of what makes the logits; None leaves it alone.
    """

    kind: str = "auto"
    bits: int | None = None
    group: int | None = None
    head: int | None = None


def pack(name: str, kernel: Float[np.ndarray, "in out"], wish: Wish, order: Order | None = None) -> Matrix:
    """Returns a kernel in the format that is wished for, or in the smallest of all that its zeros allow.

    A bitmap that would be no smaller than all weights is not made: these are kept. `order` is the order of inputs that
    the kernel was pruned to a pattern in, if it was one of its own; its few bytes do not count, for kernels of GPUs
    read 2:4 and no bitmaps.

    Raises:
        InputError: the kernel is not of the pattern, or the order none of its inputs; `name` says which it is.
    """
    if order is not None and order.size != kernel.shape[0]:
        raise InputError(f"{name}: got an order of {order.size} inputs, expected {kernel.shape[0]}; prune it again")
    bits, group = wish.bits or 8 * kernel.dtype.itemsize, wish.group
    group = GROUPS.get(bits) if group is None else group
    counts = (kernel != 0).sum(0).tolist()
    forms = [WeightFormat(kind, bits, group) for kind in _kinds(kernel, wish, order)]
    smallest = min(forms, key=lambda form: form.nbytes(kernel.shape[0], kernel.shape[1], counts))
    try:
        return encode(kernel, smallest, order if smallest.pattern else None)
    except ValueError as error:
        raise InputError(f"--weights: {name} cannot be packed as {wish.kind} ({error})") from error


def pack_head(name: str, leaf: Float[np.ndarray, "a b"], bits: int) -> Matrix:
    """Returns what makes the logits, in codes: the head's kernel, or the embeddings where these are both."""
    try:
        if name == EMBEDDING:
            return encode_table(leaf, bits, GROUPS[bits])
        return encode(leaf, WeightFormat("dense", bits, GROUPS[bits]))
    except ValueError as error:
        raise InputError(f"--head: {name} cannot be packed ({error})") from error


def _kinds(kernel: np.ndarray, wish: Wish, order: Order | None) -> tuple[str, ...]:
    """Returns the kinds that a wish leaves to choose from."""
    if wish.kind == "auto":
        return *_patterns(kernel if order is None else kernel[order]), "dense", "bitmap"
    return ("dense", "bitmap") if wish.kind == "bitmap" else (wish.kind,)


def _patterns(kernel: np.ndarray) -> Iterator[str]:
    """Yields the patterns that a kernel's zeros are of."""
    for pattern in PATTERNS:
        n, m = map(int, pattern.split(":"))
        if kernel.shape[0] % m == 0:
            groups = kernel.reshape(-1, m, kernel.shape[1]) != 0
            if groups.sum(1).max() <= n:
                yield pattern
