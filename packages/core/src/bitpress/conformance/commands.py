"""Run the command with the plugins of a folder, for the tests of schemes."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest.mock import patch

import pytest

from bitpress.checkpoint.source_formats import discover_formats
from bitpress.cli import main
from bitpress.schemes.registry import discover


def install(
    folder: Path, name: str, module: str, entry_points: str, requires: Sequence[str] = ()
) -> Path:
    """Write version 1.0 of a distribution into a folder. Python finds it if the folder is on its
    path.

    Its one module has the same name, with dashes as underscores.
    """
    module_name = name.replace("-", "_")
    folder.mkdir(exist_ok=True)
    (folder / f"{module_name}.py").write_text(module)
    dist_info = folder / f"{module_name}-1.0.dist-info"
    dist_info.mkdir(exist_ok=True)
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
    metadata += "".join(f"Requires-Dist: {requirement}\n" for requirement in requires)
    (dist_info / "METADATA").write_text(metadata)
    (dist_info / "entry_points.txt").write_text(entry_points)
    return folder


@contextlib.contextmanager
def plugins(folder: Path | None) -> Iterator[None]:
    """Let this process find the plugins of a folder until the block ends."""
    modules_before, path_before = set(sys.modules), list(sys.path)
    if folder is not None:
        sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    discover.cache_clear()
    discover_formats.cache_clear()
    try:
        yield
    finally:
        sys.path[:] = path_before
        discover.cache_clear()
        discover_formats.cache_clear()
        # Another test's plugins may have modules of the same names.
        for name in set(sys.modules) - modules_before:
            file = str(getattr(sys.modules[name], "__file__", None))
            if folder is not None and file.startswith(str(folder)):
                del sys.modules[name]


def command(*arguments: object, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command in this process, which is faster than in another.

    Returns:
        Its output and exit code.
    """
    argv, out, err = ["bitpress", *map(str, arguments)], io.StringIO(), io.StringIO()
    with (
        plugins(path),
        patch.object(sys, "argv", argv),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as exit_info,
    ):
        main()
    exit_code = int(str(exit_info.value.code))
    return subprocess.CompletedProcess(argv, exit_code, out.getvalue(), err.getvalue())


def process(*arguments: object, path: Path | None = None) -> subprocess.Popen[str]:
    """Start the command in a process of its own, with the plugins of the folder `path`."""
    environment = dict(os.environ)
    if path is not None:
        paths = filter(None, [str(path), os.environ.get("PYTHONPATH")])
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    argv = [sys.executable, "-m", "bitpress", *map(str, arguments)]
    return subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def bitpress(*arguments: object, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, and return its output and exit code."""
    running = process(*arguments, path=path)
    out, err = running.communicate(timeout=300)
    return subprocess.CompletedProcess(running.args, running.returncode, out, err)


def refusal(*arguments: object, path: Path | None = None) -> str:
    """Run a command that must be refused, and return its one line on standard error.

    The exit code must be 2, standard output must be empty, and there must be no traceback.
    """
    done = command(*arguments, path=path)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
    assert done.returncode == 2, (done.returncode, done.stderr)
    assert done.stdout == ""
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("bitpress: ")
    return lines[0]
