"""Click's classes of arguments and commands, as the command line has them."""

from __future__ import annotations

from typing import Any

import click

from bitpress.errors import BitpressError
from bitpress.runtime.logger import logger


class Argument(click.Argument):
    """An argument with a line of help, which click itself knows only lately."""

    def __init__(self, names: Any, help: str, **kwargs: Any) -> None:
        super().__init__(names, **kwargs)
        self.help = help

    def process_value(self, ctx: click.Context, value: Any) -> Any:
        try:
            return super().process_value(ctx, value)
        except click.MissingParameter:
            if not ctx.params.get("check"):
                raise
            hint = "--check takes the word after it: write it last, or before an option"
            raise click.MissingParameter(hint, ctx, self) from None

    def get_help_record(self, ctx: click.Context) -> tuple[str, str]:
        return self.metavar or self.human_readable_name, self.help or ""


class Command(click.Command):
    """A command whose errors name its own help, also those of the parser."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as e:
            e.ctx = e.ctx or ctx
            raise


class Commands(click.Group):
    """A group that lists its commands in the order in which they are written."""

    command_class = Command

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; `--verbose` shows where its errors come from."""
        try:
            return super().invoke(ctx)
        except BitpressError:
            logger.debug("where the error comes from:", exc_info=True)
            raise

    def answer_shell(self, name: str) -> None:
        """Where a shell asks for completions, or for the script that asks, answer and exit."""
        self._main_shell_completion({}, name)
