"""One row of activations times a weight matrix on GPUs, as a decode step of one sequence needs it: in one launch."""
