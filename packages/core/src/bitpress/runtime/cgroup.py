"""What a container leaves a process: the limits of its control groups (cgroups v1 and v2)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from attrs import frozen

# Where the files of this machine's control groups are found.
ROOT = Path("/")


@frozen
class _Files:
    """The files of a cgroup that say what it limits, which v1 and v2 name otherwise.

    Attributes:
        limit: bytes of memory at most.
        usage: bytes that are in use, cached files included.
        inactive: the key in `memory.stat` of cached files that can be dropped at once.
    """

    limit: str
    usage: str
    inactive: str


V1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = _Files("memory.max", "memory.current", "inactive_file")


def available_memory(root: Path = ROOT) -> int | None:
    """Bytes that the cgroups of this process leave it; None where none limits memory.

    Args:
        root: the folder in which `proc` and `sys` are.
    """
    available = [
        _available_in(folder, files)
        for controller, files in (("memory", V1), ("", V2))
        for folder in _folders(root, controller)
    ]
    return min((num_bytes for num_bytes in available if num_bytes is not None), default=None)


def cpu_quota(root: Path = ROOT) -> int | None:
    """Cores of whose time the cgroups of this process allow it all, rounded up; None where none
    limits it.

    Args:
        root: the folder in which `proc` and `sys` are.
    """
    # microseconds in each period of so many microseconds: v2 has both in one file
    quotas = [(_read(folder / "cpu.max") or "").split() for folder in _folders(root, "")]
    quotas += [
        [_read(folder / f"cpu.cfs_{name}_us") or "" for name in ("quota", "period")]
        for folder in _folders(root, "cpu")
    ]
    # "max" of v2 and "-1" of v1 are no limits
    cores = [
        math.ceil(int(numbers[0]) / int(numbers[1]))
        for numbers in quotas
        if len(numbers) == 2 and all(number.isdecimal() for number in numbers)
    ]
    return max(min(cores), 1) if cores else None


def _available_in(folder: Path, files: _Files) -> int | None:
    """Bytes that one cgroup leaves its processes."""
    limit, usage = _read(folder / files.limit), _read(folder / files.usage)
    # "max" of v2
    if limit is None or usage is None or not limit.isdecimal():
        return None
    inactive = 0
    for line in (_read(folder / "memory.stat") or "").splitlines():
        key, _, value = line.partition(" ")
        if key == files.inactive:
            inactive = int(value)
    return max(int(limit) - int(usage) + inactive, 0)


def _folders(root: Path, controller: str) -> Iterator[Path]:
    """The folder of this process's cgroup, and those of the cgroups around it, up to the mount.

    Args:
        controller: of v1; "" for v2, which has one tree for all.
    """
    # a line is `4:memory:/path`, or `0::/path` for v2
    lines = (_read(root / "proc/self/cgroup") or "").splitlines()
    paths = [
        PurePosixPath(path)
        for _, controllers, path in (line.split(":", 2) for line in lines)
        if controller in controllers.split(",")
    ]
    for mount_root, mount_point in _mounts(root, controller):
        folder = root / mount_point.lstrip("/")
        for path in paths:
            own = folder / path.relative_to(mount_root) if path.is_relative_to(mount_root) else None
            # a container may see its own cgroup at the mount, and be told the path that it has
            # outside
            if own is None or ".." in path.parts or not own.is_dir():
                own = folder
            yield own
            yield from (parent for parent in own.parents if parent.is_relative_to(folder))


def _mounts(root: Path, controller: str) -> Iterator[tuple[str, str]]:
    """Where a tree of cgroups is mounted: the cgroup that is seen there, and the folder."""
    for line in (_read(root / "proc/self/mountinfo") or "").splitlines():
        # 35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
        mount, _, file_system = line.partition(" - ")
        kind, _, options = file_system.split(" ", 2)
        if kind == ("cgroup" if controller else "cgroup2"):
            mount_root, mount_point = mount.split(" ")[3:5]
            if not controller or controller in options.split(","):
                yield mount_root, mount_point


def _read(file: Path) -> str | None:
    """What a file holds; None where it cannot be read."""
    try:
        return file.read_text().strip()
    except OSError:
        return None
