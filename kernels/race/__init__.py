"""Decode attention timed beside its peers: who takes part, how the clock goes, and what came of it."""
