"""Source formats for bitpress: models that are published in FP8, FP4 or packed integers."""
