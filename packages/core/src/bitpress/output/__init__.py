"""What was written: its description, its proof, and reading it back."""
