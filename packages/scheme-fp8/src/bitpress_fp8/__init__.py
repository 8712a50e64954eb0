"""FP8 schemes for bitpress: `fp8` (per channel or per tensor) and `fp8-block` (128 x 128 tiles)."""
