"""How work tells how far it is."""

from __future__ import annotations

from typing import Protocol


class Told(Protocol):
    """Called with the bytes done since the last call, and a line on what was done."""

    def __call__(self, done: int, what: str = "") -> None: ...


class Progress(Protocol):
    """Called with a stage's name and its bytes; returns what is to be told of them."""

    def __call__(self, stage: str, total: int) -> Told: ...


def quiet(stage: str, total: int) -> Told:
    """Progress that nobody looks at."""
    return lambda done, what="": None
