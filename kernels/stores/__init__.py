"""How one side (keys or values) of one layer's KV cache is kept: Dense, Packed, Rounded, or Split among these.

All stores obey one rule, a function of the row's length n alone: the first `settled(n)` tokens are quantized and at
least the latest `window` tokens are exact. Groups along tokens settle whole, groups along channels token by token. So
a prefill of n tokens, n single appends and any mixture leave the same buffers. The bit-width is structure in Packed
(deployment: real bytes) and data in Rounded (search: one program serves every width); both give the same numbers.

Arrays are (b, h, s, d); a batch's rows have lengths of their own and never share a group.
"""

from kernels.stores.base import Store, exact_view, settled
from kernels.stores.dense import Dense
from kernels.stores.packed import Packed
from kernels.stores.rounded import Rounded
from kernels.stores.split import Split

__all__ = ["Dense", "Packed", "Rounded", "Split", "Store", "exact_view", "settled"]
