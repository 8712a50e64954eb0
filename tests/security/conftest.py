"""The fixtures of tests that need the core alone."""

from fixtures.core_alone import forwards_in_float32, toy, with_toy

__all__ = ["forwards_in_float32", "toy", "with_toy"]
