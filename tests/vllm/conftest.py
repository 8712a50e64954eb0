"""The option `--vllm-python`: an interpreter that has real vLLM, as
`../shared/oracles/install-vllm.sh` makes one.
"""

from __future__ import annotations

import pytest


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
