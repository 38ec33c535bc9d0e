"""Attention over a quantized KV cache: arrays in, arrays out; knows no model.

Import the submodule that you need. This file stays empty of code because `transformers` probes for a
package named `kernels` (Hugging Face's) and may import it.
"""
