"""A recipe and headers make a plan."""
