"""Every test runs for every variant of the schemes' options."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from bitpress.conformance import trial
from bitpress.errors import BitpressError
from bitpress.runtime.devices import torch_threads
from bitpress.schemes.registry import Step, discover

# The module of laws for schemes of an attention's cache; all others are for schemes of layers.
CACHE_LAWS = "test_laws_of_caches"


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
    is_of_caches = metafunc.module.__name__.endswith(CACHE_LAWS)
    steps = {name: s for name, s in steps.items() if s.scheme.quantizes_cache == is_of_caches}
    metafunc.parametrize("step", steps.values(), ids=steps)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out the laws of another kind of schemes than those that are tried."""
    installed = discover().schemes
    tried = [installed[name] for name in config.getoption("--scheme") if name in installed]
    kinds = {scheme.quantizes_cache for scheme in tried}
    is_law = collection_path.name.startswith("test_")
    if not is_law or not kinds or (collection_path.stem == CACHE_LAWS) in kinds:
        return None
    return True
