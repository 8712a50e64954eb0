"""What the vLLM that is installed beside bitpress makes of an output."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from bitpress.errors import BitpressError, Fault
from bitpress.modeling import vllm_loader


def find_engine_faults(folder: Path, python: str = sys.executable) -> Sequence[Fault]:
    """Let vLLM's loader place the tensors of a folder, in a process of its own; no weight is read.

    Args:
        python: the interpreter whose vLLM is asked.

    Raises:
        BitpressError: vLLM is not installed, or ended without an answer.
    """
    spec = importlib.util.find_spec("vllm")
    # A folder of that name is no package.
    if python == sys.executable and (spec is None or spec.origin is None):
        raise BitpressError(
            "--engine asks the vLLM of this environment, and there is none: pip install vllm"
        )
    variables = [f"{name}={value}" for name, value in vllm_loader.ENVIRONMENT.items()]
    command = ["env", *variables, python, "-P", "-m", vllm_loader.__name__, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    last_line = done.stdout.rstrip().rpartition("\n")[2]
    if done.returncode or not last_line.startswith("["):
        message = (done.stderr.strip() or "no message").splitlines()[-1]
        raise BitpressError(
            f"{folder}: vLLM ended with exit code {done.returncode} before it answered: {message}"
        )
    return [Fault("", text) for text in json.loads(last_line)]
