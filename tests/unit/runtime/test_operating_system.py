"""On macOS a run works without what only Linux has; on Windows the package can be imported, and
what needs a checkpoint's bytes is refused in one line.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from bitpress.conformance.models import write_model
from bitpress.runtime import operating_system

# What macOS lacks: of modules, and of all its files.
HIDE_FOR_MACOS = """
import builtins, io, os, pathlib, signal, sys

def hide(module, *names):
    for name in names:
        if hasattr(module, name):
            delattr(module, name)

def hide_proc(function):
    def refuse(file, *arguments, **options):
        if str(file).startswith(("/proc", "/sys")):
            raise FileNotFoundError(2, "No such file or directory", str(file))
        return function(file, *arguments, **options)
    return refuse

builtins.open = io.open = hide_proc(io.open)
os.stat = hide_proc(os.stat)
hide(os, "preadv", "pwritev", "posix_fadvise", "posix_fallocate", "sched_getaffinity",
     "sched_setaffinity", "copy_file_range", "sendfile", "splice", "memfd_create", "fdatasync")
hide(signal, "sigtimedwait", "sigwaitinfo", "SIGRTMIN", "SIGRTMAX", "SIGPWR", "SIGSTKFLT")
"""

# What Windows lacks beyond that.
HIDE_FOR_WINDOWS = """
import select
for name in ("fcntl", "resource", "termios", "tty", "pty", "pwd", "grp", "syslog", "readline"):
    sys.modules[name] = None
hide(os, "pread", "pwrite", "statvfs", "sysconf", "getuid", "geteuid", "getgid", "getegid",
     "O_NOFOLLOW", "O_DIRECTORY", "O_CLOEXEC", "uname", "getloadavg", "chown", "fchmod", "killpg",
     "getpgid", "setsid", "umask", "nice", "mkfifo")
hide(signal, "SIGKILL", "SIGXCPU", "SIGHUP", "SIGPIPE", "SIGCHLD", "SIGUSR1", "SIGUSR2", "SIGALRM",
     "pthread_sigmask", "pthread_kill", "sigwait", "SIG_BLOCK", "SIG_UNBLOCK", "alarm")
hide(select, "poll", "epoll")
"""

# Import every module, then run commands, and print exit code, output and errors of each.
RUN = """
import contextlib, importlib, io, json, pkgutil
import bitpress
# Compiled kernels need Triton, which is for Linux, or Numba.
ELSEWHERE = (".conformance", ".__main__", ".fused_", ".compiled_")
for module in pkgutil.walk_packages(bitpress.__path__, "bitpress."):
    if not any(name in module.name for name in ELSEWHERE):
        importlib.import_module(module.name)

from bitpress.cli import main

folder, *commands = sys.argv[1:]
sys.path.insert(0, folder)
results = []
for command in commands:
    sys.argv = ["bitpress", *json.loads(command)]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as e:
            results.append([e.code, out.getvalue(), err.getvalue()])
print(json.dumps(results))
"""


def run(hidden: str, toy: Path, *commands: Sequence[object]) -> list[tuple[int, str, str]]:
    """Run commands with the toy scheme in a Python that lacks what is hidden.

    Libraries are imported before, since theirs for those systems are other files.
    """
    preamble = (
        "import torch, torch.distributed.launcher.api, transformers, filelock, huggingface_hub\n"
        "import rich\n"
    )
    arguments = [json.dumps(list(map(str, command))) for command in commands]
    done = subprocess.run(
        [sys.executable, "-c", preamble + hidden + RUN, str(toy), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return [(code, out, err) for code, out, err in json.loads(done.stdout)]


def test_windows_plans_and_is_told_what_to_compress_in(toy: Path, tmp_path: Path) -> None:
    model, out = write_model(tmp_path / "model"), tmp_path / "out"
    *shown, planned, refused = run(
        HIDE_FOR_MACOS + HIDE_FOR_WINDOWS,
        toy,
        ["--help"],
        ["compress", "--help"],
        ["schemes"],
        ["plan", model, "--scheme", "toy"],
        ["compress", model, out, "--scheme", "toy"],
    )
    assert [(code, err) for code, _, err in shown] == [(0, "")] * 3
    assert (planned[0], planned[2]) == (0, "")
    assert "layers compressed" in planned[1]
    assert refused == (
        2,
        "",
        "bitpress: reading and writing weights needs Linux or macOS: on Windows, run bitpress in "
        "WSL (wsl --install)\n",
    )
    assert not out.exists()


def test_macos_compresses_and_verifies(toy: Path, tmp_path: Path) -> None:
    model, out = write_model(tmp_path / "model"), tmp_path / "out"
    for code, _, err in run(
        HIDE_FOR_MACOS,
        toy,
        ["compress", model, out, "--scheme", "toy"],
        ["verify", out, "--against", model],
    ):
        assert code == 0, err


def test_bytes_are_read_at_their_position_without_preadv(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"0123456789")
    monkeypatch.delattr(os, "preadv")
    descriptor = os.open(tmp_path / "file", os.O_RDONLY)
    target = bytearray(4)
    try:
        assert operating_system.read_at(descriptor, memoryview(target), 3) == 4
        assert target == b"3456"
        assert operating_system.read_at(descriptor, memoryview(target), 8) == 2
        assert target == b"8956"
        assert operating_system.read_at(descriptor, memoryview(target), 10) == 0
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("is_refused", [False, True])
def test_a_flush_empties_the_cache_of_the_disk_where_the_system_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_refused: bool
) -> None:
    import fcntl

    calls = []

    def control(descriptor: int, operation: int) -> int:
        calls.append(("F_FULLFSYNC", operation))
        if is_refused:
            raise OSError(45, "Operation not supported")
        return 0

    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", control)
    monkeypatch.setattr(os, "fsync", lambda descriptor: calls.append(("fsync", descriptor)))
    operating_system.flush_to_disk(7)
    assert calls == [("F_FULLFSYNC", 51), *([("fsync", 7)] if is_refused else [])]
