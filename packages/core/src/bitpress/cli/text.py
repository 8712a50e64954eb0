"""What lies between commands and the terminal: summaries, tables, warnings, progress."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import logging
import shutil
import sys
import textwrap
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import click

from bitpress.cli.progress_lines import ProgressLines
from bitpress.errors import printable, printable_line
from bitpress.runtime.logger import logger
from bitpress.runtime.progress import Progress, ignore_progress

# Where the wish for JSON is kept in click's context.
WANTS_JSON = "bitpress.wants_json"

# Where the wish for no progress is kept.
IS_QUIET = "bitpress.is_quiet"

# Files that a line names.
MAX_NAMES = 10

# Columns of the name of a fact.
FACT_INDENT = 8

# Columns of a pipe, which has none.
PIPE_WIDTH = 200

# Columns of a terminal from which on the last column of a table may be folded, and to how many.
FOLDING_WIDTH, FOLDED_WIDTH = 100, 40


class Summary(Protocol):
    """What a command has to say, for people and for scripts."""

    def as_json(self) -> dict[str, Any]:
        """One JSON document."""

    def print_text(self) -> None:
        """The same for people."""


def store_wants_json(context: click.Context, parameter: click.Parameter, wants_json: bool) -> None:
    """Keep what `--json` says, for `show` and `progress_bars`."""
    context.meta[WANTS_JSON] = wants_json


def store_is_quiet(context: click.Context, parameter: click.Parameter, is_quiet: bool) -> None:
    """Keep what `--quiet` says, for `progress_bars`."""
    context.meta[IS_QUIET] = is_quiet


def store_is_verbose(context: click.Context, parameter: click.Parameter, is_verbose: bool) -> None:
    """Where `--verbose` says so, print what is logged until the command has ended."""
    if is_verbose:
        handler = _StandardError()
        level = logger.level
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG)
        # the outermost context is still there when an error of the command is logged
        root = context.find_root()
        root.call_on_close(lambda: logger.removeHandler(handler))
        root.call_on_close(lambda: logger.setLevel(level))


class _StandardError(logging.Handler):
    """What prints log lines: on the standard error of the moment, which bars take over."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            # the command itself prints them
            return
        text = _printable_lines(self.format(record))
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        print(f"{clock} {text}", file=sys.stderr, flush=True)


def _wants_json() -> bool:
    return bool(click.get_current_context().meta.get(WANTS_JSON))


def show(summary: Summary) -> None:
    """A command's summary on standard output: one JSON document, or text."""
    if _wants_json():
        print(json.dumps(summary.as_json(), indent=2, default=str))
    else:
        summary.print_text()


def say(text: str = "", end: str = "\n") -> None:
    """One line on standard output, whatever a stranger's names in it hold."""
    print(printable(text), end=end)


def say_fact(name: str, text: str) -> None:
    """A line that begins with what it is about; several, below each other, in a terminal that is
    narrower.
    """
    text = printable(text)
    if sys.stdout.isatty():
        text = _fold(text, FACT_INDENT, shutil.get_terminal_size().columns)
    print(f"{name:{FACT_INDENT}}{text}")


def _fold(text: str, indent: int, width: int) -> str:
    """Lines of whole words; those after the first are indented, and all end before the width."""
    lines = textwrap.wrap(
        text, max(width - indent, FOLDED_WIDTH), break_long_words=False, break_on_hyphens=False
    )
    return f"\n{'':{indent}}".join(lines)


class _PrintableRecord(logging.LogRecord):
    """What a library logs."""

    def getMessage(self) -> str:  # noqa: N802 (as logging calls it)
        return _printable_lines(super().getMessage())


@contextlib.contextmanager
def printable_messages() -> Iterator[None]:
    """Inside, what libraries log and warn of is text alone: they repeat a stranger's names too."""
    make_record, format_warning = logging.getLogRecordFactory(), warnings.formatwarning
    show_warning = warnings.showwarning

    def format_printable_warning(*args: Any, **kwargs: Any) -> str:
        return _printable_lines(format_warning(*args, **kwargs))

    def show_line(
        message: Warning | str, category: type[Warning], *args: Any, **kwargs: Any
    ) -> None:
        # the place in the code of what is meant for the user tells nothing
        if category is UserWarning:
            warn([str(message)])
        else:
            show_warning(message, category, *args, **kwargs)

    logging.setLogRecordFactory(_PrintableRecord)
    warnings.formatwarning, warnings.showwarning = format_printable_warning, show_line
    try:
        yield
    finally:
        warnings.showwarning = show_warning
        logging.setLogRecordFactory(make_record)
        warnings.formatwarning = format_warning


def _printable_lines(text: str) -> str:
    return "\n".join(map(printable, text.split("\n")))


def print_notes(texts: Iterable[str]) -> None:
    """One line each on standard error: what was chosen for the user, and is nothing wrong."""
    for text in texts:
        print(printable_line(text), file=sys.stderr)


def warn(texts: Iterable[str]) -> None:
    """One line each, on standard error."""
    for text in texts:
        print(f"warning: {printable_line(text)}", file=sys.stderr)


def print_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Columns of text, of which the last one may be folded; records where the terminal is too
    narrow for that. Nothing is cut.
    """
    from rich.box import SIMPLE_HEAD
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table

    cells = [[printable_line(str(cell)) for cell in row] for row in rows]
    if not cells:
        return
    terminal = Console()
    # Rich itself would end the process where nobody reads a pipe any more: it writes into a text.
    # What reads a pipe has no width.
    text = io.StringIO()
    console = Console(
        file=text,
        width=terminal.width if terminal.is_terminal else PIPE_WIDTH,
        force_terminal=terminal.is_terminal,
        markup=False,
        highlight=False,
        emoji=False,
    )
    widths = [max(map(cell_len, column)) for column in zip(head, *cells, strict=True)]
    if console.width >= FOLDING_WIDTH:
        widths[-1] = min(widths[-1], FOLDED_WIDTH)
    # rich sets three spaces between columns, and one at both ends
    if sum(widths) + 3 * (len(widths) - 1) + 2 > console.width:
        _print_records(head, cells, console.width)
        return

    table = Table(*head, box=SIMPLE_HEAD, pad_edge=False)
    for column in table.columns[:-1]:
        column.no_wrap = True
    for row in cells:
        table.add_row(*row)
    console.print(table)
    print(text.getvalue(), end="")


def _print_records(head: Sequence[str], rows: Iterable[Sequence[str]], width: int) -> None:
    """A paragraph for each row, with a line for each cell, or several; the first, which names it,
    stays whole.
    """
    indent = max(map(len, head)) + 2
    for row in rows:
        print()
        print(f"{head[0]:{indent}}{row[0]}")
        for name, cell in zip(head[1:], row[1:], strict=True):
            print(f"{name:{indent}}{_fold(cell, indent, width)}")
    print()


def print_record(head: Sequence[str], row: Sequence[str]) -> None:
    """A line for each cell after its name, or several where the terminal is narrow."""
    from rich.console import Console

    terminal = Console()
    cells = [printable_line(cell) for cell in row]
    _print_records(head, [cells], terminal.width if terminal.is_terminal else PIPE_WIDTH)


def say_what_is_left(names: Sequence[str]) -> None:
    """A line on the files of a model's folder that are not copied, if there are any."""
    if names:
        num_hidden = len(names) - MAX_NAMES
        more = f" and {num_hidden} more" if num_hidden > 0 else ""
        say(f"not copied: {', '.join(names[:MAX_NAMES])}{more} (--copy PATTERN)")


@contextlib.contextmanager
def garbage_collection_paused() -> Iterator[None]:
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
def progress_bars(is_silent: bool = False) -> Iterator[Progress]:
    """A bar per stage with the time left, on a terminal; lines elsewhere; nothing with `--quiet` or
    `--json`.
    """
    is_quiet = click.get_current_context().meta.get(IS_QUIET)
    if is_silent or is_quiet or _wants_json():
        yield ignore_progress
        return
    if not sys.stderr.isatty():
        lines = ProgressLines()
        yield lines
        lines.finish()
        return
    from bitpress.cli.progress_bars import open_bars

    with open_bars() as bars:
        yield bars.start_stage
