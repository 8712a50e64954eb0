"""`--max-memory` holds: under a limit that the system enforces a run ends well; what would not fit
is refused beforehand.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fixtures.cgroups import can_limit_memory, in_cgroup, limited_cgroup
from fixtures.learner_scheme import CONFIG, runnable_model

import bitpress
from bitpress.conformance.commands import refusal
from bitpress.conformance.models import llama_tensors
from bitpress.planning import memory_estimate

# Everything is imported before the limit is set, and what is resident by then is taken off it.
# RLIMIT_DATA counts private writable memory: the heap, stacks, and what is mapped for tensors,
# touched or not.
LIMITED = """
import os, resource, sys
import torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
from bitpress import cli
from bitpress.compression import run
torch.set_num_threads(1)
limit = int(sys.argv.pop(1))
torch.ones(64, 64) @ torch.ones(64, 64)
def read(key):
    lines = open("/proc/self/status")
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
resident = read("VmRSS:")
resource.setrlimit(resource.RLIMIT_DATA, (read("VmData:") + limit - resident, -1))
try:
    cli.main()
finally:
    print("resident at first and at most:", resident, read("VmHWM:"), file=sys.stderr)
"""
LARGE = CONFIG | {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "head_dim": 128,
    "num_hidden_layers": 2,
}


def limited(limit: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The command where the system gives no more than the limit, less the share of the interpreter
    and its libraries.
    """
    return python(LIMITED, limit, *arguments, *max_memory(limit))


def max_memory(limit: int) -> list[str]:
    """The option, for so many bytes."""
    return ["--max-memory", f"{limit / 1e6}MB"]


def python(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A script in a process of its own."""
    words = [sys.executable, "-c", script, *map(str, arguments)]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "1",
        "HF_HUB_OFFLINE": "1",
    }
    return subprocess.run(words, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--scheme", "fp8"],
        ["--scheme", "w4a16", "--set", "group_size=32", "--samples", 32, "--sequence-length", 96],
    ],
    ids=["data-free", "calibrated, hidden states on disk"],
)
def test_a_run_keeps_to_what_it_said_it_would_need(tmp_path: Path, arguments: list[object]) -> None:
    torch.manual_seed(0)
    model = runnable_model(tmp_path / "model", llama_tensors(config=LARGE), LARGE)
    scheme, calibrated = str(arguments[1]), "--samples" in arguments
    need = memory_estimate.estimate_memory(bitpress.plan(model, scheme=scheme), 1, (32, 96))
    words = ["compress", model, tmp_path / "out", *arguments, "--threads", 1]
    words += ["--calibration", tmp_path / "text.txt"] if calibrated else []
    # before there is anything that a limit of the system could end
    assert "MB of memory, more than the" in refusal(*words, *max_memory(need - 1_000_000))
    assert not (tmp_path / "out").exists()
    done = limited(need + 1000, *words)
    assert done.returncode == 0, done.stderr
    assert int(done.stderr.split()[-1]) < need + 1000
    assert (tmp_path / "out/config.json").exists()


# A model whose tokens take much where they wait inside a block, and little else.
WIDE_INPUTS = CONFIG | {
    "hidden_size": 256,
    "intermediate_size": 4096,
    "head_dim": 64,
    "num_hidden_layers": 1,
}

# What a container gives, in bytes: less than the run would take for speed on a machine.
CONTAINER_BYTES = 1_300_000_000

# A container that the system enforces, as far as it is not one: its limit is in the files of a
# cgroup, whose usage is what is resident before the run.
CONTAINED = LIMITED.replace(
    "try:\n    cli.main()",
    """
import functools, pathlib
from bitpress.runtime import cgroup
root = pathlib.Path(sys.argv.pop(1))
(root / "sys/fs/cgroup/memory.max").write_text(str(limit))
(root / "sys/fs/cgroup/memory.current").write_text(str(resident))
cgroup.available_memory = functools.partial(cgroup.available_memory, root)
try:
    cli.main()""",
)


def write_container(root: Path) -> Path:
    """A folder with the files of a process that a container of cgroups v2 holds."""
    for name, content in {
        "proc/self/cgroup": "0::/",
        "proc/self/mountinfo": "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw",
        "sys/fs/cgroup/memory.stat": "inactive_file 0",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


def calibrated_words(folder: Path) -> list[object]:
    """A calibrated run without --max-memory, its model made."""
    torch.manual_seed(0)
    tensors = llama_tensors(config=WIDE_INPUTS)
    model = runnable_model(folder / "model", tensors, WIDE_INPUTS)
    (folder / "text.txt").write_text(8 * ((folder / "text.txt").read_text() + " "))
    words = ["compress", model, folder / "out", "--scheme", "fp8", "--set", "activations=static"]
    words += ["--samples", 300, "--sequence-length", 96, "--calibration", folder / "text.txt"]
    return [*words, "--threads", 1]


def test_a_calibrated_run_keeps_to_what_a_container_s_files_say(tmp_path: Path) -> None:
    words = calibrated_words(tmp_path)
    root = write_container(tmp_path / "root")
    done = python(CONTAINED, CONTAINER_BYTES, root, *words)
    assert done.returncode == 0, done.stderr
    assert int(done.stderr.split()[-1]) < CONTAINER_BYTES


@pytest.mark.skipif(not can_limit_memory(), reason="no cgroup can be made here")
def test_a_calibrated_run_ends_well_in_a_container(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "bitpress", *map(str, calibrated_words(tmp_path))]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with limited_cgroup(CONTAINER_BYTES) as group:
        done = subprocess.run(
            in_cgroup(group, words), env=environment, capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/config.json").exists()


WATCHED = """
import ctypes, sys
from bitpress import cli
from bitpress.runtime import memory
from bitpress.schemes import pipeline
memory.TRANSFORMERS_BYTES = 0  # memory is short from the beginning
solve, idle = pipeline.quantize_whole, [0]
def watched(*arguments):
    before = memory.resident_bytes()
    ctypes.CDLL(None).malloc_trim(0)
    idle.append(before - memory.resident_bytes())
    return solve(*arguments)
pipeline.quantize_whole = watched
try:
    cli.main()
finally:
    print(len(idle), max(idle), file=sys.stderr)
"""


def test_where_memory_is_short_a_solution_starts_without_what_observing_took(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    model = runnable_model(tmp_path / "model", llama_tensors(config=LARGE), LARGE)
    words = [
        "compress",
        model,
        tmp_path / "out",
        "--scheme",
        "w4a16",
        "--set",
        "group_size=32",
        "--max-memory",
        "600MB",
    ]
    words += [
        "--calibration",
        tmp_path / "text.txt",
        "--samples",
        32,
        "--sequence-length",
        96,
        "--no-verify",
    ]
    done = python(WATCHED, *words)
    assert done.returncode == 0, done.stderr
    solved, idle = map(int, done.stderr.split()[-2:])
    assert solved > 8
    assert idle < 10_000_000
