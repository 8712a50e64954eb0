"""One self-contained HTML page about an output: what it holds, how near it is to its source, where
it serves.
"""
