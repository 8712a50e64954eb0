"""Fixtures: sparse tensor cores where there are some, and torch's operators for them on the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import cslt_reference
import pytest
import torch


@pytest.fixture(params=["cpu", "cuda"], scope="session")
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The CPU, with a slow form of each operator, and a GPU with sparse tensor cores."""
    if request.param == "cuda":
        if not (torch.cuda.is_available() and torch.backends.cusparselt.is_available()):
            pytest.skip("no GPU with sparse tensor cores")
        yield torch.device("cuda")
        return
    library = cslt_reference.install()
    yield torch.device("cpu")
    library._destroy()
