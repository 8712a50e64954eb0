"""One run at a time writes into a folder."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path

from bitpress.errors import OutputError

NAME = ".bitpress.lock"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Inside the block no other run, in this process or another, gets the folder's lock.

    The system holds the lock (flock) for the process and lets go of it when the process ends,
    however it ends: a file that was left behind hinders nobody. It is a file, and not the folder
    itself, because NFS locks only what is open for writing; there the server holds the lock, for
    clients on every machine, and gives that of a lost client up after its lease. A file system that
    has no locks (Lustre mounted without them) is told of by a warning, and the run goes on.

    Raises:
        OutputError: another run has the lock.
    """
    file = folder / NAME
    descriptor = _take(file, folder)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
    finally:
        # while it is still held
        file.unlink(missing_ok=True)
        os.close(descriptor)


def _take(file: Path, folder: Path) -> int:
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(descriptor, 300, 0).decode(errors="replace") or "just begun"
            os.close(descriptor)
            raise OutputError(
                f"{folder}: another run writes into it ({owner}); wait for it, or name another "
                "folder"
            ) from None
        except OSError as e:
            warnings.warn(
                f"{folder}: this file system has no locks ({e.strerror}); let only one run write "
                "there",
                stacklevel=2,
            )
        if _is_at(descriptor, file):
            return descriptor
        # the run that had it has ended meanwhile, and has taken the file away
        os.close(descriptor)


def _is_at(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False
