"""Which instruction sets this CPU has."""

from __future__ import annotations

import functools

import torch


@functools.cache
def has_cpu_feature(*names: str) -> bool:
    """Whether the CPU has one of these instruction sets, by `torch.cpu.get_capabilities`.

    False where torch does not know: older releases have no such function.
    """
    if not hasattr(torch.cpu, "get_capabilities"):
        return False
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in names)
