"""Sparse weights for bitpress: the schemes `sparse-2of4` and `sparse`."""
