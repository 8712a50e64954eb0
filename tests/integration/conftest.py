"""What holds for all tests of packages together."""

import os

# Kernels run in Triton's interpreter: it is asked for when any test first imports Triton.
os.environ["TRITON_INTERPRET"] = "1"
