"""INT8 weights and activations for bitpress: the scheme `int8`."""
