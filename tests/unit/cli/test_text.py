"""What commands show is text, whatever a stranger has named a tensor."""

from __future__ import annotations

import io
import sys

import click
import pytest

from bitpress.cli.commands import app
from bitpress.cli.text import print_table, progress_bars, say

NAME = "a\x1b[31m[red]:smile:\x07\r"
SHOWN = r"a\x1b[31m[red]:smile:\x07"


class Terminal(io.StringIO):
    """Standard error of somebody who watches."""

    def isatty(self) -> bool:
        return True


def test_a_bar_shows_a_name_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "200")
    with click.Context(app), progress_bars() as progress:
        progress("compressing", 10)(5, NAME)
    assert SHOWN in terminal.getvalue()
    assert "\x1b[31m[red]" not in terminal.getvalue()


def test_a_line_and_a_table_show_a_name_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    say(NAME)
    print_table(("name",), [(NAME,)])
    shown = capsys.readouterr().out
    assert shown.count(SHOWN) == 2
    assert "\x1b" not in shown
