"""Write the pages of docs/reference that say what the code says: its commands, its hooks, the
schemes that are installed.

python tools/pages.py          (tox run -e pages has all schemes installed)
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from bitpress.cli import app
from bitpress.schemes import hookspecs

HERE = Path(__file__).parents[1] / "docs/reference"
NOTE = "<!-- written by tools/pages.py from the code: do not edit, run it -->\n\n"


def pages() -> Mapping[str, str]:
    """Every generated page: its name, and its text."""
    return {
        "commands.md": NOTE + commands(),
        "hooks.md": NOTE + hooks(),
        "schemes.md": NOTE + schemes(),
    }


def commands() -> str:
    """What `bitpress --help` and `bitpress COMMAND --help` say."""
    group = app
    text = [f"# Commands\n\n{group.help}\n", _table(("option", "what it does"), _options(group))]
    text.append(
        "Exit codes: 0: the command has finished. 1: a check of the result failed, or `recommend` "
        "found nothing. 2: the usage or the input is wrong; one line says what. 130: you "
        "interrupted the command. 141: nobody reads its output any more.\n"
    )
    for name, command in group.commands.items():
        arguments = [_metavar(p) for p in command.params if p.param_type_name == "argument"]
        text.append(
            f"## {name}\n\n{command.help}\n\n```\n{' '.join(['bitpress', name, *arguments])} "
            "[OPTIONS]\n```\n"
        )
        rows = [
            (f"`{_metavar(p)}`", p.help or "")
            for p in command.params
            if p.param_type_name == "argument"
        ]
        text.append(_table(("argument or option", "what it is"), [*rows, *_options(command)]))
    return "\n".join(text)


def hooks() -> str:
    """The docstrings of `hookspecs`."""
    tree = ast.parse(inspect.getsource(hookspecs))
    text = [
        f"# Hooks\n\nVersion {hookspecs.VERSION}: the version of bitpress-core that last changed a "
        "hook.\n",
        _markdown(ast.get_docstring(tree) or ""),
    ]
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            arguments = "".join(f"    {ast.unparse(argument)},\n" for argument in node.args.args)
            signature = (
                f"def {node.name}(\n{arguments}) -> "
                f"{ast.unparse(node.returns or ast.Constant(None))}"
            )
            text.append(
                f"## {node.name}\n\n```python\n{signature}\n```\n\n"
                f"{_markdown(ast.get_docstring(node) or '')}"
            )
    return "\n".join(text)


def schemes() -> str:
    """What `bitpress schemes` says of every scheme."""
    words = [sys.executable, "-m", "bitpress", "schemes", "--json"]
    document = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
    text = [
        "# Installed schemes\n\nThese schemes are in this repository. `bitpress schemes NAME` "
        "shows the same.\n"
    ]
    for scheme in document["schemes"]:
        data = (
            "needed with the default options" if scheme["data"] else "none with the default options"
        )
        bits = "" if scheme["bits"] is None else f"Bits per code: {scheme['bits']:g}. "
        text.append(
            f"## {scheme['name']}\n\n{scheme['summary']}\n\nPackage: `{scheme['package']}`. "
            f"{bits}Calibration: {data}.\n"
        )
        for level, options in scheme["efforts"].items():
            settings = " ".join(f"`{name}={value}`" for name, value in options.items())
            text.append(f"`--effort {level}`: {settings}\n")
        rows = [
            (f"`{n}`", o["values"], f"`{json.dumps(o['default'])}`", o["help"])
            for n, o in scheme["options"].items()
        ]
        text.append(_table(("option", "values", "default", "what it sets"), rows))
        grouped: dict[tuple[str, str], list[str]] = {}
        for finding in scheme["hardware"]:
            grouped.setdefault((finding["level"], finding["text"]), []).append(finding["device"])
        rows = [(level, what, ", ".join(devices)) for (level, what), devices in grouped.items()]
        text.append(_table(("level", "what to expect", "devices"), rows))
    return "\n".join(text)


def _options(command: Any) -> Iterator[tuple[str, str]]:
    for parameter in command.params:
        if parameter.param_type_name == "option":
            names = ", ".join(f"`{name}`" for name in parameter.opts)
            default = (
                parameter.default
                if isinstance(parameter.default, (int, str)) and not parameter.is_flag
                else None
            )
            value = "" if parameter.is_flag else f" `{_metavar(parameter)}`"
            end = "" if default is None else f" Default: `{default}`."
            end += " Required." if parameter.required else ""
            yield f"{names}{value}", (parameter.help or "") + end


def _metavar(parameter: Any) -> str:
    # what names none is a whole number
    return str(parameter.metavar or "N")


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [
        head,
        ("---",) * len(head),
        *([cell.replace("|", "\\|") for cell in row] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _markdown(docstring: str) -> str:
    """A docstring whose sections (`Args:`, ...) are lists and bold words, and whose lines that
    belong together are one.
    """
    lines: list[str] = []
    section = ""
    for line in docstring.splitlines():
        if result := re.fullmatch(r"(Args|Returns|Raises):", line):
            section = result[1]
            lines += [f"**{section}**", ""]
        elif section and (item := re.fullmatch(r" {4}(\w+): (.*)", line)) and section != "Returns":
            lines.append(f"- `{item[1]}`: {item[2]}")
        elif section and line and lines[-1]:
            lines[-1] += f" {line.strip()}"
        else:
            section = section if line.startswith(" ") or not line else ""
            lines.append(line.strip())
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    HERE.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (HERE / name).write_text(text, encoding="utf-8")
