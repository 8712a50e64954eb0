"""What differs between operating systems: reads at a position, and writes that reach the disk.

Linux and macOS have all that a run needs. Windows has no reads and writes at a position of a shared
file: there the command line, plans and what plugin authors import work.
"""

from __future__ import annotations

import contextlib
import os

from bitpress.errors import BitpressError

# Of a much larger piece, Linux reads only the beginning.
READ_AHEAD_BYTES = 1 << 20


def require_posix() -> None:
    """Raise BitpressError where weights cannot be read or written: on Windows outside WSL."""
    if not hasattr(os, "pread"):
        raise BitpressError(
            "reading and writing weights needs Linux or macOS: on Windows, run bitpress in WSL "
            "(wsl --install)"
        )


def read_at(descriptor: int, target: memoryview, position: int) -> int:
    """Fill a part of a buffer with a file's bytes from a position on, and return how many it is."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [target], position)
    # macOS before 11
    data = os.pread(descriptor, len(target), position)
    target[: len(data)] = data
    return len(data)


def read_ahead(descriptor: int, position: int, num_bytes: int) -> None:
    """Let the system read some of a file into its cache, while this process goes on."""
    if not hasattr(os, "posix_fadvise"):
        return
    for start in range(position, position + num_bytes, READ_AHEAD_BYTES):
        # file systems that cannot will read when they are asked to
        with contextlib.suppress(OSError):
            os.posix_fadvise(descriptor, start, READ_AHEAD_BYTES, os.POSIX_FADV_WILLNEED)


def flush_to_disk(descriptor: int) -> None:
    """Return once a file's bytes lie on the disk."""
    try:
        import fcntl
    except ImportError:
        pass
    else:
        # On macOS fsync leaves bytes in the disk's own cache, which a power failure empties. File
        # systems that cannot empty it refuse, and then fsync does what can be done.
        if hasattr(fcntl, "F_FULLFSYNC"):
            with contextlib.suppress(OSError):
                fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
                return
    os.fsync(descriptor)
