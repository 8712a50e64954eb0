"""Memory of this process: how much it holds, how much is free, and giving freed memory back."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# bytes of memory that Python with torch takes before any work
TORCH_BYTES = 450_000_000

# bytes that Python with torch and transformers takes, their buffers and freed memory
TRANSFORMERS_BYTES = 550_000_000

# as <malloc.h> numbers them
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3

# bytes: what glibc comes to by itself with large tensors
USUAL = {M_MMAP_THRESHOLD: 32 << 20, M_TRIM_THRESHOLD: 64 << 20}

KEPT = {M_MMAP_THRESHOLD: 1 << 30, M_TRIM_THRESHOLD: (1 << 31) - 1}


@contextmanager
def freed_kept() -> Iterator[None]:
    """For a while the C library (glibc) keeps what is freed for what comes next, until `give_back`.

    The system zeroes every page it hands out: where each batch's tensors are mapped anew, that is a
    tenth of all CPU time.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        yield
        return
    for which, size in KEPT.items():
        libc.mallopt(which, size)
    try:
        yield
    finally:
        for which, size in USUAL.items():
            libc.mallopt(which, size)
        give_back()


def give_back(allowed: int = 0) -> None:
    """Let the system have freed memory again, where the C library (glibc) keeps what lies between
    what is used.

    Args:
        allowed: bytes beyond what the interpreter takes: while less than half of them are taken,
            nothing is done.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim") and (
        not allowed or taken() > TRANSFORMERS_BYTES + allowed // 2
    ):
        libc.malloc_trim(0)


def taken() -> int:
    """Bytes of memory that this process holds; more than any limit where the system does not
    say.
    """
    file = Path("/proc/self/statm")
    return (
        int(file.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        if file.is_file()
        else sys.maxsize
    )


def available() -> int:
    """Bytes that can be taken without swapping; 8 GB where the system does not say."""
    file = Path("/proc/meminfo")
    for line in file.read_text().splitlines() if file.is_file() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 8 << 30
