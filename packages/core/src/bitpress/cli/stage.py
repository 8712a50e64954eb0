"""How far a stage of a command is, and how long it may still take."""

from __future__ import annotations

import math
import threading
import time

from attrs import frozen

from bitpress.errors import printable_line
from bitpress.runtime.progress import BLOCK, FINISHED_EARLIER

# What is reported in so many seconds from the start was finished earlier.
RESUME_SECONDS = 1.0


@frozen
class _Mark:
    """How far the work was, and when."""

    seconds: float
    num_bytes: int


class Stage:
    """The work that was reported of a stage, by several threads, and what it says of the rest.

    Work on decoder blocks is estimated from finished blocks alone: a block begins with what takes
    long and ends with what does not.

    Attributes:
        name: of the stage.
        block: that the last report was of, `block 3/8`; empty for other work.
    """

    def __init__(self, name: str, total_bytes: int) -> None:
        self.name, self.block = name, ""
        self._total_bytes, self._num_bytes, self._text = total_bytes, 0, ""
        # What was finished earlier tells nothing of the time left: it is measured from here on.
        self._start = self._first = _Mark(time.monotonic(), 0)
        self._last_block_end: _Mark | None = None
        # whether an earlier run has finished the block
        self._is_resumed = False
        self._lock = threading.Lock()

    def report(self, num_bytes: int, text: str = "") -> None:
        """Take note of work that is done, and of what it was, or is now."""
        with self._lock:
            now = _Mark(time.monotonic(), self._num_bytes)
            match = BLOCK.match(text)
            block = match[0] if match else ""
            if block != self.block:
                if not self.block or self._is_resumed:
                    self._first = now
                else:
                    self._last_block_end = now
                self.block, self._is_resumed = block, False
            self._is_resumed |= text.endswith(FINISHED_EARLIER)
            self._num_bytes += num_bytes
            self._text = text
            if not block and now.seconds - self._start.seconds < RESUME_SECONDS:
                self._first = _Mark(self._start.seconds, self._num_bytes)

    @property
    def share(self) -> float:
        """The part of the work that is done, from 0 to 1."""
        return min(self._num_bytes / max(self._total_bytes, 1), 1.0)

    @property
    def elapsed(self) -> str:
        """Time since the stage began: `4:10`."""
        return format_clock(time.monotonic() - self._start.seconds)

    def describe(self, text: str | None = None) -> str:
        """`block 3/8 · mlp.down_proj · fitting · 4:10 elapsed · about 7 min left`.

        Args:
            text: in place of what was last reported.
        """
        with self._lock:
            left = self._estimate_seconds()
            words = [self._text if text is None else text, f"{self.elapsed} elapsed"]
        if left is not None:
            words.append(format_left(left))
        return printable_line(" · ".join(filter(None, words)))

    def _estimate_seconds(self) -> float | None:
        """Seconds until all is done; None where nothing tells."""
        now = _Mark(time.monotonic(), self._num_bytes)
        last = self._last_block_end if self.block else now
        if last is None or last.num_bytes <= self._first.num_bytes:
            return None
        seconds = last.seconds - self._first.seconds
        rate = seconds / (last.num_bytes - self._first.num_bytes)
        left = rate * (self._total_bytes - last.num_bytes) - (now.seconds - last.seconds)
        return left if self._num_bytes < self._total_bytes else None


def format_clock(seconds: float) -> str:
    """Hours, minutes and seconds: `4:10`, `1:04:10`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def format_left(seconds: float) -> str:
    """`about 7 min left`."""
    if seconds < 60:
        return "less than 1 min left"
    minutes = math.ceil(seconds / 60)
    if minutes < 120:
        return f"about {minutes} min left"
    return f"about {minutes / 60:.1f} h left"
