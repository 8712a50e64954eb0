"""The command `bitpress`, and how it ends."""

from __future__ import annotations

import atexit
import gc
import sys

import click

from bitpress.cli.commands import app
from bitpress.errors import (
    BitpressError,
    VerificationError,
    first_line,
    is_out_of_memory,
    printable_line,
)

__all__ = ["app", "main"]

LESS = (
    "other processes may hold some of it; fewer --threads, with data a smaller --max-memory or "
    "--sequence-length, take less, and --device cpu takes none; the same command goes on from what "
    "is finished"
)


def main() -> None:
    """Run a command; a user's mistake is one line on standard error and exit code 2, a failed check
    exit code 1.
    """
    code = 0
    # or all is looked through for garbage once more: 0.2 s and more where transformers was imported
    atexit.register(gc.freeze)
    try:
        with app.make_context("bitpress", sys.argv[1:]) as context:
            app.invoke(context)
    except VerificationError as e:
        for fault in e.faults[:10]:
            print(f"  {printable_line(str(fault))}", file=sys.stderr)
        if len(e.faults) > 10:
            print(f"  and {len(e.faults) - 10} more", file=sys.stderr)
        code = _fail(str(e), 1)
    except BitpressError as e:
        code = _fail(str(e))
    except KeyboardInterrupt:
        code = _fail("interrupted; the same command goes on from the finished shards", 130)
    except OSError as e:
        code = _fail(f"{e.filename or 'operating system'}: {e.strerror or e}")
    except click.ClickException as e:
        code = _fail(f"{e.format_message()} (bitpress --help)")
    except click.exceptions.Exit as e:
        # after --help
        code = e.exit_code
    except Exception as e:
        if not is_out_of_memory(e):
            raise
        fact = ". ".join(first_line(e).split(". ")[:2])
        code = _fail(f"the device's memory is full ({fact}): {LESS}")
    sys.exit(code)


def _fail(message: str, code: int = 2) -> int:
    print(f"bitpress: {printable_line(message)}", file=sys.stderr)
    return code
