"""Memory of this process: how much is resident, how much is free, and what glibc does with what is
freed.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bitpress.runtime import cgroup

# Bytes of memory that Python with torch takes before any work.
TORCH_BYTES = 380_000_000

# Bytes that Python takes with torch and transformers, their buffers and freed memory.
TRANSFORMERS_BYTES = 550_000_000

# Parameters of mallopt, as <malloc.h> numbers them.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3

# Bytes: the thresholds that glibc comes to by itself once it has freed large tensors.
DEFAULT_THRESHOLDS = {M_MMAP_THRESHOLD: 32 << 20, M_TRIM_THRESHOLD: 64 << 20}

# Bytes: thresholds under which tensors of up to 1 GiB stay in the heap when they are freed.
RETAINING_THRESHOLDS = {M_MMAP_THRESHOLD: 1 << 30, M_TRIM_THRESHOLD: (1 << 31) - 1}

# Bytes: thresholds under which every larger tensor goes back to the system when it is freed.
RETURNING_THRESHOLDS = {M_MMAP_THRESHOLD: 8 << 20, M_TRIM_THRESHOLD: 1 << 24}

# Bytes that are taken to be available where the system does not say.
ASSUMED_AVAILABLE_BYTES = 8 << 30


@contextmanager
def retain_freed_memory(is_memory_ample: bool = True) -> Iterator[None]:
    """Let glibc keep what is freed for the next allocation, until `release_freed_memory`.

    The system zeroes every page it hands out: where each batch's tensors are mapped anew, that is a
    tenth of all CPU time. With another C library nothing changes.

    Args:
        is_memory_ample: otherwise what is freed goes back at once. Tensors of many sizes leave
            holes in the heap, which made a run of long sequences twice as large as what it held.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        yield
        return

    thresholds = RETAINING_THRESHOLDS if is_memory_ample else RETURNING_THRESHOLDS
    for parameter, num_bytes in thresholds.items():
        libc.mallopt(parameter, num_bytes)
    try:
        yield
    finally:
        for parameter, num_bytes in DEFAULT_THRESHOLDS.items():
            libc.mallopt(parameter, num_bytes)
        release_freed_memory()


def describe_shortage(user: str, needed_bytes: int, allowed_bytes: int) -> str:
    """That something needs more memory than it may take: as a limit, what is named is enough."""
    needed, allowed = math.ceil(needed_bytes / 1e6), allowed_bytes // 1_000_000
    return f"{user} needs about {needed:,} MB of memory, more than the {allowed:,} MB allowed"


def release_freed_memory(max_working_bytes: int = 0) -> None:
    """Return freed memory to the system where glibc keeps it between blocks that are in use.

    Args:
        max_working_bytes: that the process may hold beyond `TRANSFORMERS_BYTES`: while less than
            half of them are resident, nothing is done. 0 releases always.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim"):
        return
    if not max_working_bytes or resident_bytes() > TRANSFORMERS_BYTES + max_working_bytes // 2:
        libc.malloc_trim(0)


def resident_bytes() -> int:
    """Bytes of memory that this process holds; on macOS the most that it has held so far.

    More than any limit where the system does not say.
    """
    file = Path("/proc/self/statm")
    if file.is_file():
        num_pages = int(file.read_text().split()[1])
        return num_pages * os.sysconf("SC_PAGE_SIZE")
    try:
        import resource
    except ImportError:
        return sys.maxsize
    # Systems without that file count bytes here, and not the kilobytes of Linux.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def available_bytes() -> int:
    """Bytes that can be allocated without swapping, and without breaking the limit of a container;
    8 GiB where the system does not say.
    """
    file = Path("/proc/meminfo")
    available = ASSUMED_AVAILABLE_BYTES
    for line in file.read_text().splitlines() if file.is_file() else ():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    in_cgroup = cgroup.available_memory()
    return available if in_cgroup is None else min(available, in_cgroup)


def attainable_bytes(num_processes: int = 1) -> int:
    """Bytes that this process may come to hold in all: those that it holds, and its share of what
    is available.

    Args:
        num_processes: of this machine, which share that.
    """
    return resident_bytes() + available_bytes() // num_processes


def format_bytes(num_bytes: int) -> str:
    """Bytes for people: `1.25 GB`, `0.71 MB`."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.2f} MB"
