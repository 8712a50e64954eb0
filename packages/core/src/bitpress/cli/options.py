"""Arguments and options that several commands share, and how they are declared."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

# a decorator that gives a command an argument, or several
Declared = Callable[[Any], Any]


class Argument(click.Argument):
    """An argument with a line of help, which click itself knows only lately."""

    def __init__(self, names: Any, help: str, **kwargs: Any) -> None:
        super().__init__(names, **kwargs)
        self.help = help

    def get_help_record(self, ctx: click.Context) -> tuple[str, str]:
        return self.metavar or self.human_readable_name, self.help or ""


class Commands(click.Group):
    """A group that lists its commands in the order in which they are written."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


def argument(name: str, metavar: str, help: str, **kwargs: Any) -> Declared:
    """A decorator that adds an argument to a command."""
    return click.argument(name, cls=Argument, metavar=metavar, help=help, **kwargs)


def number(name: str, help: str, default: int) -> Declared:
    """A decorator that adds an option whose value is a whole number."""
    return click.option(name, metavar="N", type=int, default=default, help=help)


def together(*declared: Declared) -> Declared:
    """Several, in the order in which they are shown."""
    return lambda command: functools.reduce(
        lambda made, one: one(made), reversed(declared), command
    )


def texts(samples: int) -> Declared:
    """What a model is run on, `samples` sequences if nothing else is said."""
    return together(
        click.option(
            "--calibration",
            metavar="FILE|DATASET",
            help="Texts like those it will serve: .jsonl, .txt, .parquet.",
        ),
        number("--samples", "Sequences taken of them.", samples),
        sequence_length,
        number("--seed", "0 takes sequences from the start, others draw them.", 0),
        click.option(
            "--all-experts",
            is_flag=True,
            help="Fit every expert to all tokens, not to those sent to it.",
        ),
    )


FILE = click.Path(path_type=Path)

model = argument("model", "MODEL", "A model folder, or a Hub name.")

out = argument("out", "OUT", "A folder that bitpress wrote.", type=FILE)

as_json = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON document and nothing else."
)

settings = together(
    click.option(
        "--set",
        "settings",
        metavar="[SCHEME.]OPTION=VALUE",
        multiple=True,
        help="Set an option; may be repeated.",
    ),
    click.option(
        "--ignore",
        metavar="PATTERN",
        multiple=True,
        help="Leave matching layers alone; may be repeated.",
    ),
)

recipe = together(
    click.option("--scheme", metavar="NAME[+NAME]", help="A scheme, or several joined by +."),
    click.option(
        "--recipe", metavar="FILE", type=FILE, help="A TOML file: which layers get which steps."
    ),
    settings,
)

sequence_length = number("--sequence-length", "Tokens of a sequence.", 512)

threads = click.option(
    "--threads",
    metavar="N",
    type=click.IntRange(min=1),
    help="Layers worked on side by side (default: one per core).",
)

machine = together(
    click.option("--trust-remote-code", is_flag=True, help="Let code in the model's folder run."),
    click.option(
        "--device",
        metavar="cpu|cuda|cuda:N",
        default="cpu",
        help="What computes; without data, cuda is every GPU.",
    ),
    click.option("--max-memory", metavar="SIZE", help="Refuse if more is needed: 4GB."),
    threads,
)
