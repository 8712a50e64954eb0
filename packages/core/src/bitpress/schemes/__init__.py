"""The plugin contract of schemes, and calling it."""
