"""What computes: devices, and how many threads."""

from __future__ import annotations

import itertools
import os
import re
import threading
from collections.abc import Iterator, Sequence
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


def devices_named(name: str) -> tuple[torch.device, ...]:
    """The devices that share what can be dealt out, `cuda` being all GPUs there are; the first does
    what cannot.
    """
    first = device_named(name)
    return (
        tuple(device_named(f"cuda:{i}") for i in range(torch.cuda.device_count()))
        if name == "cuda"
        else (first,)
    )


class Turns:
    """Devices in turn for the threads of a pool: each thread keeps one, and on a GPU a stream of
    its own.

    What a stream is given it does in order, beside what other streams do: one thread's weights are
    copied while another's are computed with. Nothing that a thread has on a GPU may be given to
    another thread, whose stream would not wait for it.
    """

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self._turns, self._thread = itertools.cycle(devices), threading.local()

    def take(self) -> None:
        """Give the calling thread the next device, for as long as it lives: a pool's
        initializer.
        """
        device = self._thread.device = next(self._turns)
        # both are a thread's own in torch
        if device.type == "cuda":
            torch.cuda.set_device(device)
            torch.cuda.set_stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]

    @property
    def device(self) -> torch.device:
        """The calling thread's."""
        return self._thread.device  # type: ignore[no-any-return]


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
