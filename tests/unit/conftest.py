"""The fixtures of tests that need the core alone."""

import os

from fixtures.core_alone import forwards_in_float32, toy, with_toy

# Kernels run in Triton's interpreter: it is asked for when any test first imports Triton.
os.environ["TRITON_INTERPRET"] = "1"

__all__ = ["forwards_in_float32", "toy", "with_toy"]
