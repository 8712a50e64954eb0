"""Killed with SIGKILL at any point whatever, a run goes on to the bytes of one that nothing
disturbed; by real schemes.

Each run is a fork of one process that has imported everything, so that a hundred deaths take
minutes.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from fixtures.learner_scheme import CONFIG, runnable_model

from bitpress.checkpoint.filenames import LOCK
from bitpress.conformance.models import files_of
from bitpress.schemes.registry import discover

# Reads lines `MOMENT|argument|argument|...`: runs the command in a fork that kills itself at that
# call which opens, writes, syncs, cuts, closes, renames or removes a file (no whole number: after
# so many seconds; 0: never), and says how it ended, and how many such calls there were.
STARTER = """
import os, pathlib, signal, sys, threading
import torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama import modeling_llama
from bitpress import cli
from bitpress.compression import run
torch.set_num_threads(1)
def work(moment, arguments, tell):
    count, lock = [0], threading.Lock()
    def watched(function):
        def call(*args, **kwargs):
            with lock:
                count[0] += 1
                if count[0] == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        return call
    for name in ("pwrite", "open", "fsync", "ftruncate", "close"):
        setattr(os, name, watched(getattr(os, name)))
    for name in ("rename", "unlink", "mkdir"):
        setattr(pathlib.Path, name, watched(getattr(pathlib.Path, name)))
    if moment != int(moment):
        signal.setitimer(signal.ITIMER_REAL, moment)  # whose signal nobody handles
    sys.argv = ["bitpress", *arguments]
    try:
        cli.main()
    except SystemExit as end:
        os.write(tell, str(count[0]).encode())
        os._exit(end.code)
for line in sys.stdin:
    moment, *arguments = line.rstrip("\\n").split("|")
    hear, tell = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(2, 1)
        work(float(moment), arguments, tell)
    os.close(tell)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), os.read(hear, 20).decode() or 0, flush=True)
    os.close(hear)
"""
MIXED = """
[[layers]]
match = "*.self_attn.*"
steps = [{ use = "w4a16", group_size = 32 }]
[[layers]]
match = "*.down_proj"
steps = ["fp8"]
[[layers]]
match = "*"
steps = [{ use = "int8", activations = "static" }]
"""
CALIBRATION = ["--samples", "12", "--sequence-length", "32", "--calibration", "text.txt"]
RECIPES: Mapping[str, list[str]] = {
    "fp8": ["--scheme", "fp8"],
    "w4a16 by GPTQ": ["--scheme", "w4a16", "--set", "group_size=32", *CALIBRATION],
    "a mixed recipe": ["--recipe", "mixed.toml", *CALIBRATION],
    "2:4 with fp8": ["--scheme", "sparse-2of4+fp8", *CALIBRATION],
}


class Starter:
    """Runs the command, again and again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.log = (folder / "log").open("w")
        self._process = subprocess.Popen(
            [sys.executable, "-c", STARTER],
            cwd=folder,
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
        )

    def run(self, moment: float, *arguments: str) -> tuple[int, int]:
        """Exit code, negative for a signal, and how many moments there were, if it came to its
        end.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("|".join([str(moment), *arguments]) + "\n")
        self._process.stdin.flush()
        code, count = self._process.stdout.readline().split()
        return int(code), int(count)

    def close(self) -> None:
        self._process.communicate()
        self.log.close()


@pytest.fixture(scope="module")
def starter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Starter]:
    folder = tmp_path_factory.mktemp("killed")
    runnable_model(folder / "model", config=CONFIG | {"num_hidden_layers": 2}, shards=2)
    (folder / "mixed.toml").write_text(MIXED)
    running = Starter(folder)
    yield running
    running.close()


def outputs(folder: Path) -> dict[str, bytes]:
    """A folder's files but that of the lock, which a run may leave behind, unlocked, when it is
    killed as its very last deed.
    """
    stored = files_of(folder) if folder.exists() else {}
    return {name: data for name, data in stored.items() if name != LOCK}


@pytest.mark.parametrize("points", [3, pytest.param(100, marks=pytest.mark.long)])
@pytest.mark.parametrize("recipe", RECIPES)
def test_killed_at_any_point_a_run_goes_on_to_the_same_bytes(
    starter: Starter, recipe: str, points: int
) -> None:
    if "sparse" in str(RECIPES[recipe]) and "sparse-2of4" not in discover().schemes:
        pytest.skip("the scheme sparse-2of4 is not installed")
    folder = starter.folder
    name = f"{recipe} {points}".replace(" ", "-").replace(":", "-")
    words = ["compress", "model", f"{name}-whole", *RECIPES[recipe], "--threads", "1"]
    began = time.monotonic()
    code, moments = starter.run(0, *words)
    lasts = time.monotonic() - began
    assert code == 0, (folder / "log").read_text()[-2000:]
    assert moments > 30
    expected, chance, died = files_of(folder / f"{name}-whole"), random.Random(recipe), 0
    for number in range(points):
        words[2] = f"{name}-{number}"
        # a call that touches a file, or any time at all; once in a while the run that goes on is
        # killed as well
        for _ in range(1 + (number % 5 == 4)):
            moment = (
                float(chance.randint(1, moments))
                if number % 2 == 0
                else chance.uniform(0, lasts) + 1e-7
            )
            code, _ = starter.run(moment, *words)
            assert code in (0, -signal.SIGKILL, -signal.SIGALRM) or (code == 2 and died), (
                moment,
                (folder / "log").read_text()[-2000:],
            )
            died += code < 0
            left = outputs(folder / words[2])
            # it looks whole, and is
            if "config.json" in left:
                assert {
                    name: data for name, data in left.items() if name in expected
                } == expected, moment
        if left != expected:
            code, _ = starter.run(0, *words)
            assert code == 0, (moment, (folder / "log").read_text()[-2000:])
        assert outputs(folder / words[2]) == expected, moment
        subprocess.run(["rm", "-r", folder / words[2]], check=True)
    assert died >= points // 2
