"""Decode attention on GPUs: packed codes go into the matrix units as they are; parts of a row are merged at the end."""
