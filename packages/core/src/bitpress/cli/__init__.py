"""The command `bitpress`, and how it ends."""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import IO

import click

from bitpress.cli.commands import app
from bitpress.cli.text import printable_messages
from bitpress.errors import (
    BitpressError,
    VerificationError,
    first_line,
    is_out_of_memory,
    printable_line,
)

__all__ = ["app", "main"]

COMMAND = "bitpress"

# How many faults of an output are shown.
NUM_FAULTS = 10

# What to do when a device has too little memory.
OUT_OF_MEMORY_ADVICE = (
    "other processes may hold some of it; fewer --threads, with data a smaller --max-memory or "
    "--sequence-length, take less, and --device cpu takes none; the same command resumes from what "
    "is finished"
)

INTERRUPTED = "interrupted; the same command resumes from the finished shards"


# How a shell reports a command that wrote to a pipe which nobody reads any more: 128 + SIGPIPE.
BROKEN_PIPE = 141


def main() -> None:
    """Run a command; a user's mistake is one line on standard error and exit code 2, a failed check
    exit code 1.
    """
    with _interrupts(), printable_messages():
        try:
            code = _run_command()
        except BrokenPipeError:
            code = BROKEN_PIPE
            _discard_unread_output()
    sys.exit(code)


def _run_command() -> int:
    """The exit code of the command that `sys.argv` holds."""
    code = 0
    # at exit all would be looked through for garbage once more, which takes 0.2 s with transformers
    atexit.register(gc.freeze)
    try:
        app.answer_shell(COMMAND)
        with app.make_context(COMMAND, sys.argv[1:]) as context:
            app.invoke(context)
        sys.stdout.flush()
    except VerificationError as e:
        for fault in e.faults[:NUM_FAULTS]:
            print(f"  {printable_line(str(fault))}", file=sys.stderr)
        if len(e.faults) > NUM_FAULTS:
            print(f"  and {len(e.faults) - NUM_FAULTS} more", file=sys.stderr)
        code = _fail(str(e), 1)
    except BitpressError as e:
        code = _fail(str(e))
    except KeyboardInterrupt:
        code = _fail(INTERRUPTED, 130)
    except OSError as e:
        # as in `bitpress schemes | head -n 1`
        if isinstance(e, BrokenPipeError) and any(map(_is_unread, (sys.stdout, sys.stderr))):
            raise
        code = _fail(f"{e.filename or 'operating system'}: {e.strerror or e}")
    except click.ClickException as e:
        command = COMMAND
        if isinstance(e, click.UsageError) and e.ctx:
            command = e.ctx.command_path
        code = _fail(f"{e.format_message()} ({command} --help)")
    except click.exceptions.Exit as e:
        # after --help
        code = e.exit_code
    except Exception as e:
        if not is_out_of_memory(e):
            raise
        fact = ". ".join(first_line(e).split(". ")[:2])
        code = _fail(f"the device's memory is full ({fact}): {OUT_OF_MEMORY_ADVICE}")
    return code


@contextlib.contextmanager
def _interrupts() -> Iterator[None]:
    """The first interrupt ends what runs inside, which tidies up; another one ends the process."""
    handler = signal.getsignal(signal.SIGINT)
    # A shell may have had it ignored, and a program that calls this may have its own, or threads.
    is_main_thread = threading.current_thread() is threading.main_thread()
    if handler is not signal.default_int_handler or not is_main_thread:
        yield
        return
    signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        # After an interrupt it stays: Python waits for threads after the last line.
        if signal.getsignal(signal.SIGINT) is _interrupt:
            signal.signal(signal.SIGINT, handler)


def _interrupt(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGINT, _end_process)
    raise KeyboardInterrupt


def _end_process(number: int, frame: FrameType | None) -> None:
    # Nothing may be raised from here on. The progress bars have hidden the cursor.
    show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""
    os.write(2, f"{show_cursor}bitpress: {INTERRUPTED}\n".encode())
    os._exit(130)


def _is_unread(stream: IO[str]) -> bool:
    """Whether a stream is a pipe whose reader is gone."""
    # Windows does not say.
    if not hasattr(select, "poll"):
        return False
    poll = select.poll()
    try:
        poll.register(stream.fileno(), select.POLLOUT)
    except (OSError, ValueError):
        # a program that calls this may have put something else in its place
        return False
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _discard_unread_output() -> None:
    """Python writes what is left at exit, and would complain."""
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        if _is_unread(stream):
            os.dup2(null, stream.fileno())
    os.close(null)


def _fail(message: str, code: int = 2) -> int:
    print(f"bitpress: {printable_line(message)}", file=sys.stderr)
    return code
