"""Every test runs for every variant of the schemes' options."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bitpress.conformance import trial
from bitpress.errors import BitpressError
from bitpress.runtime.devices import torch_threads
from bitpress.schemes.registry import Step, discover


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Use one thread: for weights this small, a second thread costs more time than it saves."""
    with torch_threads(1):
        yield


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run each test for every variant of the schemes' options."""
    config = metafunc.config
    schemes = config.getoption("--scheme")
    if not schemes:
        raise pytest.UsageError("bitpress.conformance needs --scheme NAME")
    steps: dict[str, Step] = {}
    try:
        for scheme in schemes:
            variants = trial.variants(scheme, config.getoption("--set"), discover())
            prefix = f"{scheme}, " if len(schemes) > 1 else ""
            steps |= {f"{prefix}{variant}": step for variant, step in variants.items()}
    except BitpressError as e:
        raise pytest.UsageError(str(e)) from None
    metafunc.parametrize("step", steps.values(), ids=steps)
