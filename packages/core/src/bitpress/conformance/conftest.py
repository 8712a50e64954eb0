"""Every test runs for every variant of the scheme's options."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bitpress.conformance import trial
from bitpress.errors import BitpressError
from bitpress.runtime.devices import torch_threads
from bitpress.schemes.registry import discover


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Use one thread: for weights this small, a second thread costs more time than it saves."""
    with torch_threads(1):
        yield


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run each test for every variant of the scheme's options."""
    config = metafunc.config
    if not config.getoption("--scheme"):
        raise pytest.UsageError("bitpress.conformance needs --scheme NAME")
    try:
        variants = trial.variants(
            config.getoption("--scheme"), config.getoption("--set"), discover()
        )
    except BitpressError as e:
        raise pytest.UsageError(str(e)) from None
    metafunc.parametrize("step", variants.values(), ids=variants)
