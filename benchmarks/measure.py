"""What a process costs: CPU and wall seconds, and memory."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from attrs import asdict, frozen

ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TQDM_DISABLE": "1",
}


@frozen
class Cost:
    """Of one process: CPU and wall seconds, and the most memory it held, in MB."""

    cpu: float
    wall: float
    memory: float


LAUNCH = """
import json, os, subprocess, sys, time
start = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
wall = time.perf_counter() - start
print(json.dumps([usage.ru_utime + usage.ru_stime, wall, usage.ru_maxrss / 1024]))
sys.exit(os.waitstatus_to_exitcode(status))
# a process of its own: the peak that a child reports starts at its parent's size
"""
# a virtual machine pays for free memory when it is first used: let nobody measured pay for it
TOUCH = "b'1' * (4 << 30)"


def run(command: Sequence[object]) -> Cost:
    """Run a command to its end and count what it cost."""
    subprocess.run([sys.executable, "-S", "-c", TOUCH], check=True)
    words = [sys.executable, "-S", "-c", LAUNCH, *(str(word) for word in command)]
    done = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{command[0]} failed:\n{done.stderr}")
    return Cost(*json.loads(done.stdout))


def row(name: str, costs: Sequence[Cost]) -> dict[str, Any]:
    """Medians of what one contender cost in all rounds, and between what its CPU seconds lay."""
    middle = Cost(
        *(statistics.median(getattr(c, f) for c in costs) for f in ("cpu", "wall", "memory"))
    )
    spread = [c.cpu for c in costs]
    return {"name": name, **asdict(middle), "cpu_min": min(spread), "cpu_max": max(spread)}


def show(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, tuple[str, str]]) -> None:
    """Print rows as a Markdown table: `columns` by heading, each a key of a row and the form of its
    figure.
    """
    head = ("", "CPU s (median, min-max)", *columns)
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for row in rows:
        cells = [
            format(row[key], form) if row.get(key) is not None else ""
            for key, form in columns.values()
        ]
        print(
            " | ".join(["| {name} | {cpu:.2f} ({cpu_min:.2f}-{cpu_max:.2f})".format(**row), *cells])
            + " |",
            flush=True,
        )
