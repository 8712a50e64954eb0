"""What containers leave a process, read from trees of files like those of the kernel."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from bitpress.runtime import cgroup, devices, memory

V1_MOUNTS = """\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 {root} /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 {root} /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
"""
V2_MOUNTS = "30 23 0:26 {root} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1_NO_LIMIT = 9223372036854771712


def tree(root: Path, mounts: str, own: str, files: Mapping[str, object]) -> Path:
    """A root folder in which this process has these mounts and cgroups, and cgroups these files."""
    for name, content in {
        "proc/self/mountinfo": mounts,
        "proc/self/cgroup": own,
        **{f"sys/fs/cgroup/{name}": content for name, content in files.items()},
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{content}\n")
    return root


def v1(folder: str, limit: int, usage: int, inactive: int = 0) -> dict[str, object]:
    """The files of a cgroup of v1 that concern memory."""
    return {
        f"memory{folder}/memory.limit_in_bytes": limit,
        f"memory{folder}/memory.usage_in_bytes": usage,
        f"memory{folder}/memory.stat": f"inactive_file 7\ntotal_inactive_file {inactive}",
    }


def v2(folder: str, limit: int | str, usage: int, inactive: int = 0) -> dict[str, object]:
    """The files of a cgroup of v2 that concern memory."""
    return {
        f"{folder}/memory.max": limit,
        f"{folder}/memory.current": usage,
        f"{folder}/memory.stat": f"anon 5\ninactive_file {inactive}",
    }


V1_OWN = "9:name=systemd:/\n4:memory:{path}\n2:cpu,cpuacct:{path}\n0::/"
CASES = {
    "v1, in the host's tree": (
        V1_MOUNTS.format(root="/"),
        V1_OWN.format(path="/a"),
        v1("", V1_NO_LIMIT, 9000) | v1("/a", 1000, 400, 100),
        700,
    ),
    "v1, a container that sees its own cgroup alone": (
        V1_MOUNTS.format(root="/docker/a"),
        V1_OWN.format(path="/docker/a"),
        v1("", 1000, 400, 100),
        700,
    ),
    "v1, no limit": (V1_MOUNTS.format(root="/"), V1_OWN.format(path="/"), {}, None),
    "v2, a container with a namespace": (
        V2_MOUNTS.format(root="/"),
        "0::/",
        v2("", 1000, 400, 50),
        650,
    ),
    "v2, a limit further out is nearer": (
        V2_MOUNTS.format(root="/"),
        "0::/a/b/c",
        v2("/a", 1000, 900) | v2("/a/b", 5000, 100) | v2("/a/b/c", "max", 50),
        100,
    ),
    "v2, no limit": (V2_MOUNTS.format(root="/"), "0::/a", v2("/a", "max", 50), None),
    "v2, a cgroup outside of the namespace": (
        V2_MOUNTS.format(root="/"),
        "0::/../a",
        v2("", 1000, 400),
        600,
    ),
    "v2, a path that is not to be seen": (
        V2_MOUNTS.format(root="/"),
        "0::/elsewhere",
        v2("", 1000, 400),
        600,
    ),
    "v2, more in use than the limit": (
        V2_MOUNTS.format(root="/"),
        "0::/",
        v2("", 1000, 1400),
        0,
    ),
    "no cgroups": ("", "", {}, None),
}


@pytest.mark.parametrize(("mounts", "own", "files", "available"), CASES.values(), ids=CASES)
def test_the_least_that_any_cgroup_leaves_is_available(
    tmp_path: Path, mounts: str, own: str, files: Mapping[str, object], available: int | None
) -> None:
    assert cgroup.available_memory(tree(tmp_path, mounts, own, files)) == available


def test_a_system_without_such_files_limits_nothing(tmp_path: Path) -> None:
    assert cgroup.available_memory(tmp_path) is None
    assert cgroup.cpu_quota(tmp_path) is None


@pytest.mark.parametrize(
    ("mounts", "own", "files", "cores"),
    [
        (V2_MOUNTS, "0::/a/b", {"a/cpu.max": "150000 100000", "a/b/cpu.max": "max 100000"}, 2),
        (V2_MOUNTS, "0::/", {"cpu.max": "20000 100000"}, 1),
        (V2_MOUNTS, "0::/", {"cpu.max": "max 100000"}, None),
        (
            V1_MOUNTS,
            V1_OWN.format(path="/"),
            {
                "cpu,cpuacct/cpu.cfs_quota_us": 300_000,
                "cpu,cpuacct/cpu.cfs_period_us": 100_000,
            },
            3,
        ),
        (
            V1_MOUNTS,
            V1_OWN.format(path="/"),
            {"cpu,cpuacct/cpu.cfs_quota_us": -1, "cpu,cpuacct/cpu.cfs_period_us": 100_000},
            None,
        ),
    ],
    ids=["v2", "v2, part of a core", "v2, no limit", "v1", "v1, no limit"],
)
def test_a_quota_is_so_many_cores(
    tmp_path: Path, mounts: str, own: str, files: Mapping[str, object], cores: int | None
) -> None:
    assert cgroup.cpu_quota(tree(tmp_path, mounts.format(root="/"), own, files)) == cores


def test_a_container_s_limits_are_those_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    num_cores, num_bytes = devices.count_cores(), memory.available_bytes()
    monkeypatch.setattr(cgroup, "cpu_quota", lambda: 1)
    monkeypatch.setattr(cgroup, "available_memory", lambda: 1000)
    assert (devices.count_cores(), memory.available_bytes()) == (1, 1000)
    monkeypatch.setattr(cgroup, "cpu_quota", lambda: num_cores + 1)
    monkeypatch.setattr(cgroup, "available_memory", lambda: 1 << 60)
    assert devices.count_cores() == num_cores
    assert memory.available_bytes() == pytest.approx(num_bytes, rel=0.5)
