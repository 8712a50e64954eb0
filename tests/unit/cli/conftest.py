"""A clock for what tells the time."""

from __future__ import annotations

import pytest

from bitpress.cli import progress_lines, stage


class Clock:
    """A clock that the test sets.

    Attributes:
        ticks: for the test's own counting.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.ticks = 0

    def monotonic(self) -> float:
        return self.seconds

    def strftime(self, form: str) -> str:
        return "12:00:00"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(stage, "time", clock)
    monkeypatch.setattr(progress_lines, "time", clock)
    return clock
