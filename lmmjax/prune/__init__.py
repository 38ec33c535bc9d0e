"""One-shot pruning as functions of params: calibrate -> score -> allocate -> mask -> apply."""
