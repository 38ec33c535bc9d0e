"""Packing a pruned model: every linear without its zeros, in a checkpoint like any other."""
