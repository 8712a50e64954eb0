"""What a run says to programs that call it: the logger `bitpress`, silent until they listen."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable

# A program that listens to it decides what is shown.
logger = logging.getLogger("bitpress")
logger.addHandler(logging.NullHandler())


def log_warnings(texts: Iterable[str]) -> None:
    """What a result tells the user, for those who read a log."""
    for text in texts:
        logger.warning("%s", text)


def warn(text: str, stacklevel: int = 1) -> None:
    """Warn of what no result tells, and log it.

    Args:
        stacklevel: 1 is the caller's own line, as for `warnings.warn`.
    """
    logger.warning("%s", text)
    warnings.warn(text, stacklevel=stacklevel + 1)
