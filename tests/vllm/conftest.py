"""The option `--vllm-python`: an interpreter that has real vLLM, as `../shared/oracles/install-vllm.sh` makes one."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--vllm-python", metavar="PYTHON", help="an interpreter that has vLLM (tox run -e vllm makes one)")
