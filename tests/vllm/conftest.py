"""The option `--vllm-python`: an interpreter that has real vLLM, as
`../shared/oracles/install-vllm.sh` makes one.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

LOADER = Path(__file__).parent / "load_models.py"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--vllm-python",
        metavar="PYTHON",
        help="an interpreter that has vLLM (tox run -e vllm makes one)",
    )


@pytest.fixture(scope="session")
def python(request: pytest.FixtureRequest) -> str:
    """The interpreter with vLLM."""
    if not (python_path := request.config.getoption("--vllm-python", None)):
        pytest.skip("needs --vllm-python PYTHON: tox run -e vllm")
    return str(python_path)


@pytest.fixture(scope="session")
def load(python: str) -> Callable[[Sequence[Path]], Mapping[str, Sequence[str]]]:
    """What vLLM's loader says of folders."""

    def load(folders: Sequence[Path]) -> Mapping[str, Sequence[str]]:
        command = [python, "-P", str(LOADER), *map(str, folders)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        faults: Mapping[str, Sequence[str]] = json.loads(done.stdout.splitlines()[-1])
        return faults

    return load
