"""The tables of packed weights: a model decoding, and one product, beside torch, XLA and llama.cpp."""

from collections.abc import Mapping
from typing import Any

from benchmarks import tables

LEGEND = """Half of a decoder's prunable weights zero, packed by `python -m lmmjax.pack`; *dense* ones are whole. A side
decodes in a process of its own, by turns. Peaks are a process's, loading, compiling and libraries included; llama.cpp
holds the decoder alone, the others the vision tower, too. Products are of one row of float32; *of reading* is the share
of the speed at which torch sums 512 MB, with all cores.
"""
PEER = "transformers, bfloat16"


def page(name: str, found: Mapping[str, Any]) -> str:
    """Returns the tables of a file of `benchmarks.weights`, and what they rest on."""
    parts = [_decode(found["decode"])] if "decode" in found else []
    parts += [_products(found["products"])] if "products" in found else []
    about = next(iter(found.values()))["about"]
    return "\n".join([*parts, f"{tables.machine(about)}; `{about['command']}`; {tables.source(name)}.\n"])


def _decode(found: Mapping[str, Any]) -> str:
    head = [
        f"{found['model']}, {found['tokens']} tokens",
        "ms a token",
        "fastest",
        "of transformers, bfloat16",
        "weights",
        "peak",
    ]
    peer = found["sides"][PEER]["ms_per_token"]["median"]
    lines = [
        [
            side,
            f"{one['ms_per_token']['median']:.1f}",
            f"{min(one['ms_per_token']['runs']):.1f}",
            f"{peer / one['ms_per_token']['median']:.2f}x",
            f"{one['weights_bytes'] / 1e6:.0f} MB",
            f"{one['peak_bytes'] / 1e6:.0f} MB",
        ]
        for side, one in found["sides"].items()
    ]
    return tables.table(head, lines)


def _products(found: Mapping[str, Any]) -> str:
    shapes = found["shapes"]
    head = ["ms a product (GB/s, of reading)", *shapes]
    sides = dict.fromkeys(side for of in shapes.values() for side in of)
    lines = [[side, *(_product(of.get(side)) for of in shapes.values())] for side in sides]
    return tables.table(head, lines)


def _product(one: Mapping[str, Any] | None) -> str:
    if one is None:
        return "-"
    return f"{one['ms']['median']:.2f} ({one['bytes_per_s'] / 1e9:.1f}, {100 * one['of_stream']:.0f}%)"
