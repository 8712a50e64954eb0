"""Models of transformers: built without weights, run block by block, on tokens."""
