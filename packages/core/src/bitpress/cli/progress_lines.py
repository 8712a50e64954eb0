"""Progress for logs: a line for each block, with the time."""

from __future__ import annotations

import re
import sys
import threading
import time

from bitpress.errors import printable_line
from bitpress.runtime.progress import ReportProgress

# Seconds between two lines of one stage: at least, and at most if anything is reported.
MIN_SECONDS, MAX_SECONDS = 10.0, 60.0

# What is reported in so many seconds from the start was finished earlier.
RESUME_SECONDS = 1.0

# The block that a layer lies in: `model.layers.3` of `model.layers.3.mlp.up_proj: error 0.0120`.
BLOCK = re.compile(r"[\w.]*?\.\d+(?=\.|$|:)")


class ProgressLines:
    """Lines on standard error, none for what takes less than some seconds."""

    def __call__(self, stage: str, num_bytes: int) -> ReportProgress:
        """Begin a stage."""
        return _Stage(stage, num_bytes)


class _Stage:
    def __init__(self, name: str, total_bytes: int) -> None:
        self._name = name
        self._total_bytes = total_bytes
        self._num_bytes = 0
        # What an earlier run has finished, which tells nothing of the time left.
        self._finished_bytes = 0
        self._block = ""
        self._start = self._last_line = time.monotonic()
        # Several threads report.
        self._lock = threading.Lock()

    def __call__(self, num_bytes: int, text: str = "") -> None:
        with self._lock:
            self._num_bytes += num_bytes
            match = BLOCK.match(text)
            block = match[0] if match else ""
            now = time.monotonic()
            if now - self._start < RESUME_SECONDS:
                self._finished_bytes = self._num_bytes
            is_next_block = block != self._block
            if now - self._last_line >= (MIN_SECONDS if is_next_block else MAX_SECONDS):
                self._print_line(block, now)
                self._last_line = now
                self._block = block

    def _print_line(self, block: str, now: float) -> None:
        share = min(self._num_bytes / max(self._total_bytes, 1), 1)
        elapsed = now - self._start
        done = self._num_bytes - self._finished_bytes
        left = max(self._total_bytes - self._num_bytes, 0)
        words = [
            f"{time.strftime('%H:%M:%S')} {self._name} {share:.0%}",
            *filter(None, [block]),
            f"{_format_seconds(elapsed)} elapsed",
        ]
        if done:
            words.append(f"about {_format_seconds(elapsed * left / done)} left")
        print(printable_line(", ".join(words)), file=sys.stderr, flush=True)


def shorten_name(text: str) -> str:
    """What is reported of a layer, without the list of blocks: `block 3, mlp.up_proj`."""
    match = re.fullmatch(r"[\w.]*?\.(\d+)\.(.+)", text)
    return f"block {match[1]}, {match[2].removesuffix('.weight')}" if match else text


def _format_seconds(seconds: float) -> str:
    """Hours, minutes and seconds: `4:10`, `1:04:10`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
