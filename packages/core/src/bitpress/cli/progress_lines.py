"""Progress for logs: a line for each block, with the time."""

from __future__ import annotations

import sys
import threading
import time

from bitpress.cli.stage import Stage
from bitpress.runtime.progress import ReportProgress

# Seconds from the last line to that of a finished block; at least, so that small models say little.
BLOCK_SECONDS = 2.0

# Seconds from the start of a stage to its first line, and from one line to the next, inside a block
# and of work that knows no blocks.
FIRST_SECONDS, MAX_SECONDS = 10.0, 60.0


class ProgressLines:
    """Lines on standard error, none for what takes less than some seconds."""

    def __init__(self) -> None:
        self._stage: _StageLines | None = None

    def __call__(self, stage: str, num_bytes: int) -> ReportProgress:
        """Begin a stage, which ends the one before."""
        self.finish()
        self._stage = _StageLines(Stage(stage, num_bytes))
        return self._stage.report

    def finish(self) -> None:
        """Print the line of the last block."""
        if self._stage is not None:
            self._stage.finish()
            self._stage = None


class _StageLines:
    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._last_line = time.monotonic()
        self._max_seconds = FIRST_SECONDS
        # Several threads report.
        self._lock = threading.Lock()

    def report(self, num_bytes: int, text: str = "") -> None:
        with self._lock:
            block = self._stage.block
            self._stage.report(num_bytes, text)
            if block and block != self._stage.block:
                self._finish_block(block)
            elif time.monotonic() - self._last_line >= self._max_seconds:
                self._print_line(self._stage.describe())

    def finish(self) -> None:
        with self._lock:
            if self._stage.block:
                self._finish_block(self._stage.block)

    def _finish_block(self, block: str) -> None:
        if time.monotonic() - self._last_line >= BLOCK_SECONDS:
            self._print_line(self._stage.describe(f"{block} done"))

    def _print_line(self, text: str) -> None:
        stage = self._stage
        # rounded down: 100% is the end
        percent = int(100 * stage.share)
        line = f"{time.strftime('%H:%M:%S')} {stage.name} {percent}% · {text}"
        print(line, file=sys.stderr, flush=True)
        self._last_line = time.monotonic()
        self._max_seconds = MAX_SECONDS
