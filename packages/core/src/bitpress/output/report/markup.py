"""Pieces of the page that hold any content: sections, tables, and what a click unfolds."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

Row = Sequence[object]


def render_section(title: str, content: str, text: str = "") -> str:
    """A heading, a paragraph and HTML; nothing where there is no content."""
    if not content:
        return ""
    paragraph = f"<p>{html.escape(text)}</p>\n" if text else ""
    return f"<section>\n<h2>{html.escape(title)}</h2>\n{paragraph}{content}\n</section>"


def render_fold(title: str, content: str) -> str:
    """HTML that is shown once its title is clicked."""
    return f"<details><summary>{html.escape(title)}</summary>{content}</details>"


def render_table(head: Sequence[str], rows: Iterable[Row]) -> str:
    """A table that scrolls in its own box.

    Args:
        head: titles of columns; those that begin with # hold numbers.
        rows: cells, which are HTML.
    """
    kinds = [' class="number"' if name.startswith("#") else "" for name in head]
    titles = "".join(
        f'<th scope="col"{kind}>{html.escape(name.lstrip("#"))}</th>'
        for name, kind in zip(head, kinds, strict=True)
    )
    title_row = f"<thead><tr>{titles}</tr></thead>" if any(head) else ""
    body = ""
    for row in rows:
        cells = [f"<td{kind}>{cell}</td>" for cell, kind in zip(row, kinds, strict=True)]
        body += f"<tr>{''.join(cells)}</tr>\n"
    # A box that scrolls must be reachable by keyboard.
    return f'<div class="wide" tabindex="0"><table>{title_row}<tbody>\n{body}</tbody></table></div>'


def render_name(name: str) -> str:
    """The name of a layer, tensor or file, or a digest."""
    return f"<code>{html.escape(name)}</code>"


def format_error(error: float | None) -> str:
    """A relative error as a percentage; a dash where there is none."""
    return "-" if error is None else f"{error:.3%}"
