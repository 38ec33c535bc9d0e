"""Split-KV decode attention in Pallas Triton: Ampere, Ada, Orin and later."""
