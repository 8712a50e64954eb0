"""Progress in a terminal: a bar for each stage, and a line for what is being done."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress as RichProgress, TaskProgressColumn, TextColumn
from rich.text import Text

from bitpress.cli.stage import Stage
from bitpress.runtime.progress import ReportProgress

# Columns of a bar.
BAR_WIDTH = 40


class ProgressBars(RichProgress):
    """A bar for each stage, with the time that it took; below them, how far the last one is."""

    def __init__(self) -> None:
        self._stage: Stage | None = None
        super().__init__(
            TextColumn("{task.description}", markup=False),
            BarColumn(BAR_WIDTH),
            TaskProgressColumn(),
            TextColumn("{task.fields[elapsed]}", markup=False),
            console=Console(stderr=True),
        )

    def get_renderables(self) -> Iterable[RenderableType]:
        """What is drawn."""
        yield self.make_tasks_table(self.tasks)
        if self._stage is not None:
            yield Text(self._stage.describe(), overflow="fold")

    def start_stage(self, stage: str, num_bytes: int) -> ReportProgress:
        """Begin a stage, which ends the one before."""
        self.finish_stage()
        self._stage = current_stage = Stage(stage, num_bytes)
        task = self.add_task(stage, total=1.0, elapsed="")

        def report(num_bytes: int, text: str = "") -> None:
            current_stage.report(num_bytes, text)
            self.update(task, completed=current_stage.share)

        return report

    def finish_stage(self) -> None:
        """Fill the bar of the last stage: what it did not do was finished earlier."""
        if self._stage is not None:
            self.update(self.task_ids[-1], completed=1.0, elapsed=self._stage.elapsed)
            self._stage = None


@contextlib.contextmanager
def open_bars() -> Iterator[ProgressBars]:
    """Bars on standard error, until the block ends."""
    with ProgressBars() as bars:
        yield bars
        bars.finish_stage()
        sys.stderr.flush()
