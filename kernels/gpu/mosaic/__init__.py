"""Split-KV decode attention in Pallas Mosaic GPU: Hopper."""
