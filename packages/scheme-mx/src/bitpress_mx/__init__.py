"""Microscaling formats for bitpress, groups of 32 with a power of two: `mxfp4` and `mxfp8`."""
