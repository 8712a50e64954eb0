"""What lies between commands and the terminal: progress, sizes, JSON."""

from __future__ import annotations

import contextlib
import gc
import json
import re
import sys
from collections.abc import Iterator
from typing import Any

from bitpress.errors import RecipeError
from bitpress.runtime.progress import Progress, Told, quiet


def document(value: Any) -> None:
    """One JSON document on standard output."""
    print(json.dumps(value, indent=2, default=str))


def size(text: str | None) -> int | None:
    """Bytes of `--max-memory`."""
    if text is None:
        return None
    found = re.fullmatch(r"\s*([\d.]+)\s*([kmgt]?)i?b?\s*", text.lower())
    try:
        number = float(found[1]) if found else -1.0
    except ValueError:
        number = -1.0
    if not found or number < 0:
        raise RecipeError(f"--max-memory {text}: a size such as 4GB or 500MB is expected")
    return int(number * 1000 ** " kmgt".index(found[2] or " "))


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Imports inside make objects that stay to the end: looking through them for garbage costs a
    third of importing torch.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextlib.contextmanager
def progress(silent: bool) -> Iterator[Progress]:
    """A bar per stage with the time left, on a terminal; nothing elsewhere."""
    if silent or not sys.stderr.isatty():
        yield quiet
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress as Bars,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=Console(stderr=True)) as bars:

        def stage(stage: str, total: int) -> Told:
            task = bars.add_task(stage, total=total)
            return lambda done, what="": bars.update(
                task, advance=done, description=f"{stage} {what}".strip()
            )

        yield stage
