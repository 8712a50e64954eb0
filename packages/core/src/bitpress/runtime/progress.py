"""How long work tells how far it is: what the command line draws its bars from."""

from __future__ import annotations

import re
import threading
from typing import Protocol

from bitpress.errors import BitpressError
from bitpress.runtime.logger import logger

# How the text of work on decoder blocks begins: `block 3/8 · mlp.down_proj · fitting`.
BLOCK = re.compile(r"block (\d+)/(\d+)")

# How the text ends of a block that an earlier run has finished, which takes next to no time.
FINISHED_EARLIER = "finished earlier"

# By how much a tensor that is copied costs less than one that is compressed: on a CPU, 2 GB/s are
# copied, and 0.25 GB/s compressed.
COPY_DISCOUNT = 8


class ReportProgress(Protocol):
    """Called with the work done since the last call, in bytes or what costs as much, and a line
    that says what was done or, with no bytes, what is being done now.
    """

    def __call__(self, num_bytes: int, text: str = "") -> None: ...


class Progress(Protocol):
    """Called when a stage begins, with its name and bytes; returns what its work reports to."""

    def __call__(self, stage: str, num_bytes: int) -> ReportProgress: ...


def ignore_bytes(num_bytes: int, text: str = "") -> None:
    """A report that nobody looks at."""


def ignore_progress(stage: str, num_bytes: int) -> ReportProgress:
    """Progress that nobody looks at."""
    return ignore_bytes


def in_block(report_progress: ReportProgress, index: int, num_blocks: int) -> ReportProgress:
    """What work on one decoder block reports to: its texts get the block before them.

    Args:
        index: of the block, from 0.
    """
    block = f"block {index + 1}/{num_blocks}"

    def report(num_bytes: int, text: str = "") -> None:
        report_progress(num_bytes, f"{block} · {text}" if text else block)

    return report


class RepeatableWork:
    """Work that may be begun again, whose first part then is not reported twice.

    Args:
        report_progress: what it reports to.
    """

    def __init__(self, report_progress: ReportProgress) -> None:
        self._report_progress = report_progress
        self._done = self._reported = 0

    def __call__(self, num_bytes: int, text: str = "") -> None:
        """Report work, of which bytes count that are beyond those of earlier times."""
        self._done += num_bytes
        new_bytes = max(self._done - self._reported, 0)
        self._reported += new_bytes
        self._report_progress(new_bytes, text)

    def begin_again(self) -> None:
        """What is reported from now on, is the work from its beginning."""
        self._done = 0


def copy_work(num_bytes: int) -> int:
    """The work of copying so many bytes, in bytes to compress."""
    return num_bytes // COPY_DISCOUNT


def choose_progress(progress: Progress | bool | None) -> Progress:
    """Progress as a caller of the Python API asks for it, which the logger `bitpress` is told too.

    Args:
        progress: True shows bars, in a notebook as in a terminal; None and False show nothing.

    Raises:
        BitpressError: it is neither of these nor a function.
    """
    if progress is None or progress is False:
        return LoggedProgress(ignore_progress)
    if progress is True:
        return LoggedProgress(show_progress)
    if not callable(progress):
        raise BitpressError(
            "progress: True, False or a function of a stage's name and bytes is expected, not "
            f"{type(progress).__name__}"
        )
    return LoggedProgress(progress)


def show_progress(stage: str, num_bytes: int) -> ReportProgress:
    """A bar of `tqdm` for a stage: a widget in a notebook, a line on standard error elsewhere."""
    from tqdm.auto import tqdm

    bar = tqdm(total=num_bytes, desc=stage, unit="B", unit_scale=True)
    # Several threads report.
    lock = threading.Lock()
    num_left = num_bytes

    def report(num_bytes: int, text: str = "") -> None:
        nonlocal num_left
        with lock:
            # More may be reported than the stage was thought to have.
            bar.update(min(num_bytes, num_left))
            num_left -= min(num_bytes, num_left)
            # What begins now, and has no bytes yet, is shown at once.
            bar.set_postfix_str(text, refresh=not num_bytes)
            if not num_left:
                bar.close()

    return report


class LoggedProgress:
    """Progress of which the logger `bitpress` gets a line for each stage and each block (INFO)."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def __call__(self, stage: str, num_bytes: int) -> ReportProgress:
        """Begin a stage."""
        logger.info("%s: %.1f MB", stage, num_bytes / 1e6)
        report_progress = self._progress(stage, num_bytes)
        # Blocks are done one after another; threads that report twice of one only log it twice.
        last_block = ""
        num_done = 0
        total_bytes = max(num_bytes, 1)

        def report(num_bytes: int, text: str = "") -> None:
            nonlocal last_block, num_done
            num_done += num_bytes
            match = BLOCK.match(text)
            if match and match[0] != last_block:
                last_block = match[0]
                logger.info("%s: %s, %.0f%%", stage, last_block, 100 * num_done / total_bytes)
            report_progress(num_bytes, text)

        return report
