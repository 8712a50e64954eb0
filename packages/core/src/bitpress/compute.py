"""What computes: a device, and how many threads."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from bitpress.errors import BitpressError, first_line


def device_named(name: str) -> torch.device:
    """The device that computes; raises BitpressError where there is none of that name."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise BitpressError(f"--device {name}: it is cpu, cuda or cuda:N")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise BitpressError(f"--device {name}: {first_line(e)}") from None
    return device


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Torch's own threads, for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
