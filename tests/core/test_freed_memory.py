"""What is freed between two batches is there for the next, and is the system's again afterwards."""

from __future__ import annotations

import ctypes
import os
import resource
from pathlib import Path

import pytest
import torch

from bitpress.calibrate import memory

PAGES = (48 << 20) // os.sysconf("SC_PAGE_SIZE")  # of a tensor that is larger than what glibc keeps by itself

pytestmark = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")


def faults_of_a_tensor() -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(48 << 20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1])


def test_a_tensor_that_was_freed_makes_room_for_the_next_without_a_page_fault() -> None:
    with memory.freed_kept():
        counts = [faults_of_a_tensor() for _ in range(4)]  # something small may settle between two
    assert min(counts) < PAGES / 10
    assert min(faults_of_a_tensor() for _ in range(4)) > PAGES / 10


def test_afterwards_what_was_freed_is_the_system_s() -> None:
    before = resident()
    with memory.freed_kept():
        faults_of_a_tensor()
        assert resident() > before + PAGES / 2
    assert resident() < before + PAGES / 2
