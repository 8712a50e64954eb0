"""One run at a time writes into a folder."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from bitpress.checkpoint.filenames import LOCK
from bitpress.errors import OutputError
from bitpress.runtime.logger import warn

# How a file system without locks refuses flock: Lustre mounted without them gives ENOSYS, some FUSE
# file systems ENOTSUP, and NFS whose lock daemon does not run ENOLCK.
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold the folder's lock inside the block: no other run, in this process or another, gets it.

    The system holds the lock (flock) for the process, and releases it when the process ends in any
    way. A lock file that a killed run left behind hinders nobody. On NFS the server holds the lock,
    for clients on every machine, and releases that of a lost client after its lease. A file system
    without locks causes a warning, and the run goes on.

    Raises:
        OutputError: another run has the lock.
    """
    file = folder / LOCK
    lock = FileLock(file, timeout=0, fallback_to_soft=False)
    _acquire(lock, folder)
    try:
        _write_owner(file, f"process {os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        # Removed while it is held: after the release it may be the next run's. Where it cannot be,
        # nothing is lost: nobody holds it then.
        with contextlib.suppress(OSError):
            file.unlink()
        lock.release()


def _acquire(lock: FileLock, folder: Path) -> None:
    while not lock.is_locked:
        try:
            lock.acquire()
        except Timeout:
            owner = _read_owner(folder / LOCK)
            # None: the run that had the lock has just ended, and has removed its file.
            if owner is not None:
                raise OutputError(
                    f"{folder}: another run writes into it ({owner or 'just begun'}); wait for it, "
                    "or name another folder"
                ) from None
        except OSError as e:
            if e.errno not in NO_LOCKS:
                raise
            warn(
                f"{folder}: this file system has no locks ({e.strerror}); let only one run write "
                "there",
                stacklevel=4,
            )
            return


def _write_owner(file: Path, owner: str) -> None:
    """Write into the lock's file, and into no other that a link has put in its place."""
    # Where the file system has no locks, no file was made.
    descriptor = os.open(file, os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW, 0o644)
    with open(descriptor, "w", encoding="utf-8") as f:
        if os.fstat(descriptor).st_nlink <= 1:
            f.truncate()
            f.write(owner)


def _read_owner(file: Path) -> str | None:
    """What the run that holds a lock has written into its file; None where there is no file."""
    try:
        return file.read_text(errors="replace")[:300]
    except FileNotFoundError:
        return None
