"""FP8 keys and values for bitpress."""
