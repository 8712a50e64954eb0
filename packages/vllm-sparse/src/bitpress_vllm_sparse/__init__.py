"""vLLM serves sparse checkpoints of bitpress: those without their zeros, and on sparse tensor
cores.
"""

from __future__ import annotations


def register() -> None:
    """What vLLM calls in each of its processes (entry point of `vllm.general_plugins`)."""
    # A module is imported once, however often vLLM calls.
    from bitpress_vllm_sparse import quantization_config  # noqa: F401
