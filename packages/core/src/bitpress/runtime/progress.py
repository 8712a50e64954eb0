"""How long work tells how far it is: what the command line draws its bars from."""

from __future__ import annotations

from typing import Protocol


class ReportProgress(Protocol):
    """Called with the bytes done since the last call, and a line that says what they were."""

    def __call__(self, num_bytes: int, text: str = "") -> None: ...


class Progress(Protocol):
    """Called when a stage begins, with its name and bytes; returns what its work reports to."""

    def __call__(self, stage: str, num_bytes: int) -> ReportProgress: ...


def ignore_bytes(num_bytes: int, text: str = "") -> None:
    """A report that nobody looks at."""


def ignore_progress(stage: str, num_bytes: int) -> ReportProgress:
    """Progress that nobody looks at."""
    return ignore_bytes
