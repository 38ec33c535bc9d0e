"""The flags of a command that say how a KV cache is quantized: a CacheFormat but for its window and dtype."""

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmmjax.plan import CacheFormat

# Written out here, since the module that knows them takes seconds to import: see lmmjax.plan.
CHOICES = {
    "key_axis": ("tokens", "channels"),
    "visual_values": ("channels", "tokens"),
    "metadata": ("float16", "float8"),
    "keys": ("after_rope", "before_rope"),
    "rotate_values": ("no", "online", "folded"),
    "codebook": ("uniform", "normal"),
}
"""What may be said, the default first."""
HELP = {
    "key_axis": "what the keys' groups run along",
    "visual_values": "what the groups of image tokens' values run along",
    "metadata": "dtype of the groups' spans and zeros",
    "keys": "whether keys are quantized before or after RoPE",
    "rotate_values": "whether values are turned by a Hadamard matrix",
    "codebook": "even levels, or those of the normal distribution",
}


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the flags, as a group of their own."""
    flag = parser.add_argument_group("how the cache is quantized").add_argument
    flag("--group", type=int, default=32, metavar="N", help="tokens or channels that share a scale (default: 32)")
    flag("--value-group", type=int, metavar="N", help="the same for values (default: as keys)")
    flag("--sinks", type=int, default=0, metavar="N", help="first tokens kept exact (default: 0)")
    for name, choices in CHOICES.items():
        said = f"{HELP[name]} (default: {choices[0]})"
        flag(f"--{name.replace('_', '-')}", choices=choices, default=choices[0], help=said)
    flag("--rotate-keys", action="store_true", help="turn queries and keys by a Hadamard matrix")
    flag("--clip", action="store_true", help="narrow each group's range to where the squared error is least")


def read(args: argparse.Namespace, **other: Any) -> "CacheFormat":
    """Returns the format that the flags describe; `other` are the fields that no flag sets.

    Raises:
        InputError: flags that do not go together, or numbers out of range.
    """
    from lmmjax.plan import CacheFormat

    named = ("group", "value_group", "sinks", "rotate_keys", "clip", *CHOICES)
    return CacheFormat(**{name: getattr(args, name) for name in named}, **other)
