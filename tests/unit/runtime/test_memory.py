"""What is freed between two batches is there for the next, and is the system's again afterwards."""

from __future__ import annotations

import ctypes
import functools
import json
import os
import subprocess
import sys

import pytest

from bitpress.runtime import memory

# of a tensor that is larger than what glibc keeps by itself
PAGES = (48 << 20) // os.sysconf("SC_PAGE_SIZE")
PROGRAM = """
import json, pathlib, resource, torch
from bitpress.runtime import memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(48 << 20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1])

found = {"without": min(faults() for _ in range(4)), "before": resident()}
with memory.retain_freed_memory():
    # Something small may settle between two, and glibc 2.36 sets the first six aligned blocks each
    # behind the one before.
    found |= {"within": min(faults() for _ in range(12)), "kept": resident()}
    memory.release_freed_memory(max_working_bytes=1 << 40)
    found |= {"allowed": resident()}
    memory.release_freed_memory(max_working_bytes=0)
    found |= {"refused": resident()}
found |= {"after": resident()}
print(json.dumps(found))
"""


GLIBC = pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc"
)


@functools.cache
def measured() -> dict[str, int]:
    """Pages that were faulted in, or that the process holds, by the program's names of them."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
    )
    return dict(json.loads(done.stdout))


@GLIBC
def test_freed_memory_is_there_for_the_next_tensor_and_the_system_s_again_afterwards() -> None:
    result = measured()
    assert result["without"] > PAGES / 2
    assert result["within"] < PAGES / 10
    assert result["kept"] > result["before"] + PAGES / 2 > result["after"]


@GLIBC
def test_freed_memory_is_kept_while_much_more_is_allowed() -> None:
    result = measured()
    assert result["allowed"] > result["before"] + PAGES / 2 > result["refused"]


@pytest.mark.parametrize(("needed", "words"), [(5_000_000, "5 MB"), (5_000_001, "6 MB")])
def test_the_memory_that_a_refusal_names_is_enough(needed: int, words: str) -> None:
    text = memory.describe_shortage("the run", needed, 4_999_999)
    assert text == f"the run needs about {words} of memory, more than the 4 MB allowed"
