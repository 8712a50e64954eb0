"""Weight-only integers for bitpress: the schemes `w4a16` and `w8a16`."""
