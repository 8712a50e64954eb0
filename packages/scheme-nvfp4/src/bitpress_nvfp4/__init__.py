"""4-bit floating point with two levels of scales for bitpress: the scheme `nvfp4`."""
