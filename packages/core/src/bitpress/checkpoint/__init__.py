"""Model folders on disk: safetensors headers, reading by rows, and writing that is whole or not
there.
"""
