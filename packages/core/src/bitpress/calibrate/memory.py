"""How much memory a calibrated run holds, and how much there is."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from attrs import frozen

from bitpress.errors import DataError
from bitpress.planning import Plan

# bytes that Python with torch and transformers takes, their buffers and freed memory
RUNTIME = 550_000_000
# tokens that are run through a block together
BATCH = 2048
# tokens of which statistics are taken together
OBSERVED = 4096
# numbers for each of those and each channel of the widest input: what is made of a batch on the way
TEMPORARY = 4
# hidden states that a forward waiting inside a block holds for each token, beside the input it
# waits with
WAITING = 3
# every so many batches are run through the source's weights too
REFERENCE = 8
# bytes: blocks are computed in float32, or in half of it
NUMBER = 4
# as <malloc.h> numbers them
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
# bytes: what glibc comes to by itself with large tensors
USUAL = {M_MMAP_THRESHOLD: 32 << 20, M_TRIM_THRESHOLD: 64 << 20}
KEPT = {M_MMAP_THRESHOLD: 1 << 30, M_TRIM_THRESHOLD: (1 << 31) - 1}


@frozen
class Need:
    """Bytes: with hidden states on disk, with them in memory, and of each token whose forward waits
    inside a block.
    """

    least: int
    held: int
    waiting: int

    def spilled(self, allowed: int | None) -> int:
        """Bytes of hidden states that go to disk; None allows half of what is free."""
        return (
            self.held - self.least
            if self.held > (available() // 2 if allowed is None else allowed)
            else 0
        )

    def waits(self, allowed: int, tokens: int) -> int:
        """How many forwards of so many tokens may wait inside a block."""
        return max(allowed - self.held, 0) // (self.waiting * tokens)


def batches(ids: torch.Tensor, ranks: int) -> Sequence[torch.Tensor]:
    """All batches: of as many tokens as are run together, or of fewer where there would be none for
    some rank.
    """
    if len(ids) < ranks:
        raise DataError(
            f"{len(ids)} calibration sequences for {ranks} ranks: each needs one; give more, or "
            "start fewer"
        )
    return torch.split(ids, max(min(BATCH // ids.shape[1], len(ids) // ranks), 1))


def estimate(plan: Plan, tokens: int) -> Need:
    """What a run of the plan holds, beyond what the interpreter, torch and transformers take.

    What comes before the blocks, and a block, once; later the widest block as it was and as it
    becomes, the statistics and the solution of its largest site, what is made of a batch, and the
    hidden states of so many tokens, a share of them twice.
    """
    before = sum(
        e.numel for s in plan.shards if s.block is None for e in s.copies if "lm_head" not in e.name
    )
    block = max(
        sum(e.numel for e in shard.entries) for shard in plan.shards if shard.block is not None
    )
    site = max(
        _site(*stack.shape, sum(step.calibrated for step in stack.steps)) for stack in plan.stacks
    )
    width = max(stack.shape[1] for stack in plan.stacks)
    least = NUMBER * max(before + block, 2 * block + site + TEMPORARY * OBSERVED * width)
    states = NUMBER * tokens * plan.hidden * (1 + 1 / REFERENCE)
    return Need(least, int(least + states), NUMBER * (WAITING * plan.hidden + width))


def _site(rows: int, width: int, steps: int) -> int:
    """Numbers of the statistics and the solution of a stack, of which so many steps look at
    data.
    """
    return (3 + 2 * steps) * width * width + 6 * max(steps, 1) * rows * width


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
    if hasattr(libc, "malloc_trim") and (not allowed or taken() > RUNTIME + allowed // 2):
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
