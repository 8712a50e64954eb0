"""What core's tests share: a toy scheme, since no real one is installed beside core."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support import install_toy, plugins


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A folder of plugins with the scheme `toy`, for commands."""
    return install_toy(tmp_path / "plugins")


@pytest.fixture
def with_toy(toy: Path) -> Iterator[Path]:
    """The same, found by this process too."""
    with plugins(toy):
        yield toy


@pytest.fixture(autouse=True)
def forwards_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibration computes alike on every CPU, so that it can be held to what the whole model
    computes in float32.
    """
    monkeypatch.setattr("bitpress.compression.calibrated.BFLOAT16", ())
