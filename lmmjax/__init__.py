"""LLaVA in Flax, made to fit: config -> params -> tokens."""
