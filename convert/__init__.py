"""Checkpoints in and out of Hugging Face's format."""

DTYPES = ("float32", "bfloat16", "float16")
"""What weights may be stored in, on either side."""

SHARD_BYTES = 5 * 10**9
"""How large a file of weights may get, as on the hub."""
