"""What commands show is text, whatever a stranger has named a tensor."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import time
import warnings

import click
import pytest

from bitpress.cli.commands import app
from bitpress.cli.text import print_table, printable_messages, progress_bars, say

NAME = "a\x1b[31m[red]:smile:\x07\r"
SHOWN = r"a\x1b[31m[red]:smile:\x07"


class Terminal(io.StringIO):
    """Standard error of somebody who watches."""

    def isatty(self) -> bool:
        return True


def watch(monkeypatch: pytest.MonkeyPatch, columns: int) -> Terminal:
    """A terminal of so many columns in the place of standard error."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", str(columns))
    return terminal


def wait_for(terminal: Terminal, text: str) -> None:
    """Wait until a thread has drawn a text, which it does ten times a second."""
    deadline = time.monotonic() + 20
    while text not in terminal.getvalue() and time.monotonic() < deadline:
        time.sleep(0.02)


def test_a_bar_shows_a_name_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = watch(monkeypatch, columns=200)
    with click.Context(app), progress_bars() as progress:
        progress("compressing", 10)(5, NAME)
        wait_for(terminal, SHOWN)
    assert SHOWN in terminal.getvalue()
    assert "\x1b[31m[red]" not in terminal.getvalue()


def test_a_bar_ends_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = watch(monkeypatch, columns=200)
    with click.Context(app), progress_bars() as progress:
        progress("compressing", 10)(5)
        progress("verifying", 20)(1)
    last_bars = terminal.getvalue().rpartition("compressing")[2]
    assert last_bars.count("100%") == 2


def test_a_bar_of_what_failed_stays_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = watch(monkeypatch, columns=200)
    with contextlib.suppress(OSError), click.Context(app), progress_bars() as progress:
        progress("compressing", 10)(5)
        raise OSError("disk")
    assert "50%" in terminal.getvalue()
    assert "100%" not in terminal.getvalue()


def test_a_bar_of_a_narrow_terminal_cuts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = watch(monkeypatch, columns=80)
    with click.Context(app), progress_bars() as progress:
        report_progress = progress("compressing", 10)
        report_progress(0, "block 3/8 · mlp.down_proj · fitting")
        wait_for(terminal, "down_proj")
    shown = terminal.getvalue()
    assert "block 3/8 · mlp.down_proj · fitting · 0:00 elapsed" in shown
    assert "…" not in shown


def test_a_line_and_a_table_show_a_name_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    say(NAME)
    print_table(("name",), [(NAME,)])
    shown = capsys.readouterr().out
    assert shown.count(SHOWN) == 2
    assert "\x1b" not in shown


def test_what_libraries_log_and_warn_of_is_text(capsys: pytest.CaptureFixture[str]) -> None:
    log = io.StringIO()
    logger = logging.getLogger("a library")
    handler = logging.StreamHandler(log)
    logger.addHandler(handler)
    try:
        with printable_messages():
            logger.warning("two\nlines: %s", NAME)
            shown = warnings.formatwarning(NAME, UserWarning, "file.py", 1, "line")
    finally:
        logger.removeHandler(handler)
    assert log.getvalue() == f"two\nlines: {SHOWN}\\r\n"
    assert shown == f"file.py:1: UserWarning: {SHOWN}\\r\n  line\n"


def test_a_table_for_a_reader_that_is_gone_is_a_broken_pipe(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    unread = os.fdopen(writer, "w")
    monkeypatch.setattr(sys, "stdout", unread)

    def show() -> None:
        print("before the table")
        print_table(["a", "b"], [["1", "2"]])
        sys.stdout.flush()

    with pytest.raises(BrokenPipeError):
        show()
    # what is left cannot be written when the file is closed
    with contextlib.suppress(BrokenPipeError):
        unread.close()
