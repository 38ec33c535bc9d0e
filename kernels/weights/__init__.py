"""Weight matrices without their zeros: a bit a weight and the values that are kept, as floats, int8 or int4.

A matrix has K inputs and R outputs and lies by output: row r holds the weights of output r. Laws, for all formats:

- A mask has one bit an input, bit k % 8 of byte k // 8 for input k; its rows are padded with zero bits to 64-bit words.
- `values` are the kept weights of a row in order of their inputs: floats as they are, or codes with `scales`.
- int8 codes lie in -127..127; int4 codes in -7..7, stored as code + 8, two a byte, the low nibble first.
- A weight is code * scale in float32, exactly; `group` consecutive inputs of a row share a scale (bfloat16), which is
  taken from the kept weights alone. |weight - code * scale| <= scale / 2 unless a smaller range was found better.
- An N:M matrix may have an `order` of its inputs: masks, values and groups are then of the rows in that order, place k
  holding input order[k]. `rows`, `dense` and products speak of inputs as they were.
- Floats come back as they went in, but for a zero's sign: encode, then dense, is the identity.
- The op on them is `kernels.weights.matmul.matmul`; for a JAX array x, `x @ matrix` is the same.
- The bytes that `WeightFormat.nbytes` predicts are those of the arrays, an order's apart.
"""

from kernels.weights.encode import encode, encode_table
from kernels.weights.format import WeightFormat
from kernels.weights.formats import NM, Bitmap, Full, Matrix, Table

__all__ = ["NM", "Bitmap", "Full", "Matrix", "Table", "WeightFormat", "encode", "encode_table"]
