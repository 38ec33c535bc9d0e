"""Rows of activations times weight matrices on GPUs: words as they lie in memory go into the matrix units."""
