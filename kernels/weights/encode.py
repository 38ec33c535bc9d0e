"""From a plain kernel to a matrix without its zeros; on the host, since its length depends on what is in it."""

import numpy as np
from jaxtyping import Float, Int

from kernels.weights import codes, masks
from kernels.weights.facts import assembled
from kernels.weights.format import WeightFormat
from kernels.weights.formats import Matrix, Table


def encode(kernel: Float[np.ndarray, "k r"], form: WeightFormat, order: Int[np.ndarray, "k"] | None = None) -> Matrix:
    """Returns the matrix in a format, as NumPy arrays. Floats stay in the kernel's dtype, whose bits `form` must say.

    Args:
        order: the inputs in the order in which a pattern's blocks are m consecutive ones; None: as they are.

    Raises:
        ValueError: the kernel's dtype has other bits, its zeros are not of the pattern, or an order is none of its
            inputs, or not of a pattern.
    """
    rows = np.asarray(kernel).T
    if order is not None:
        rows = rows[:, _checked(order, rows.shape[1], form)]
    if form.bits > 8 and 8 * rows.dtype.itemsize != form.bits:
        raise ValueError(f"bits: got {form.bits}, expected the {8 * rows.dtype.itemsize} of {rows.dtype}")
    inputs = rows.shape[1]
    facts = {"kind": form.kind, "inputs": inputs, "bits": form.bits, "group": min(form.group or inputs, inputs)}
    kept, arrays = _kept(rows, form), {} if order is None else {"order": np.asarray(order, np.int32)}
    if form.bits <= 8:
        rows, arrays["scales"] = codes.rounded(rows.astype(np.float32), form.bits, facts["group"])
    if kept is not None:
        arrays["mask"] = masks.packed(kept)
    if form.kind == "bitmap" and kept is not None:
        return assembled(facts, {**arrays, **_run(rows, kept, form.bits)})
    values = np.ascontiguousarray(rows) if kept is None else rows[kept].reshape(rows.shape[0], -1)
    return assembled(facts, {**arrays, "values": codes.stored(values, form.bits)})


def encode_table(embedding: Float[np.ndarray, "v e"], bits: int, group: int | None = None) -> Table:
    """Returns embeddings as codes of so many bits; rows come out in the dtype that they have now."""
    full = encode(np.asarray(embedding).T, WeightFormat("dense", bits, group))
    return Table(full.values, full.scales, full.inputs, full.bits, full.group, str(embedding.dtype))


def _checked(order: Int[np.ndarray, "k"], inputs: int, form: WeightFormat) -> Int[np.ndarray, "k"]:
    if form.pattern is None:
        raise ValueError(f"order: got one for {form.kind}, expected a pattern N:M, the only kind whose inputs have one")
    if not np.array_equal(np.sort(order), np.arange(inputs)):
        raise ValueError(f"order: got {len(order)} places, expected each of {inputs} inputs once")
    return order


def _kept(rows: np.ndarray, form: WeightFormat) -> np.ndarray | None:
    """Returns which weights are kept; None: all."""
    if form.kind == "dense":
        return None
    if form.pattern is None:
        return rows != 0
    n, m = form.pattern
    if rows.shape[1] % m:
        raise ValueError(f"{form.kind}: got {rows.shape[1]} inputs, expected a multiple of {m}")
    groups = rows.reshape(rows.shape[0], -1, m) != 0
    if (most := int(groups.sum(-1).max(initial=0))) > n:
        raise ValueError(f"{form.kind}: got {most} weights that are not zero among {m} inputs, expected at most {n}")
    # Where fewer than n are left, zeros are kept beside them: the first, since a stable sort leaves equals in order.
    chosen = np.argsort(~groups, axis=-1, kind="stable")[..., :n]
    kept = np.zeros(groups.shape, bool)
    np.put_along_axis(kept, chosen, True, axis=-1)
    return kept.reshape(rows.shape)


def _run(rows: np.ndarray, kept: np.ndarray, bits: int) -> dict[str, np.ndarray]:
    """Returns the kept values of all rows in a single run, and where rows start."""
    counts, values = kept.sum(1), rows[kept]
    if bits == 4:  # rows begin at whole bytes: a zero behind those of an odd number
        values = np.insert(values, np.cumsum(counts)[counts % 2 == 1], 0)
        counts = counts + counts % 2
    starts = np.concatenate([[0], np.cumsum(counts)])
    if starts[-1] > np.iinfo(np.int32).max:
        raise ValueError(f"bitmap: got {starts[-1]} weights that are not zero, expected less than 2^31")
    return {"values": codes.stored(values, bits), "starts": starts.astype(np.int32)}
