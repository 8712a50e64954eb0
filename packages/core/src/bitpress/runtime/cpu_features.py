"""What this CPU computes with."""

from __future__ import annotations

import functools

import torch


@functools.cache
def cpu_has(*names: str) -> bool:
    """Whether the CPU has one of these instruction sets, by `torch.cpu.get_capabilities`; False
    where torch does not know.
    """
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(known.get(name) for name in names)
