"""Where the output goes: nothing of anybody else's is written over, and a full disk is told."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest

from bitpress.conformance.commands import command, refusal
from bitpress.conformance.models import files_of, write_model


def test_an_output_folder_with_something_else_in_it_is_left_as_it_was(
    tmp_path: Path, toy: Path
) -> None:
    model, out = write_model(tmp_path / "model"), tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    assert "thesis.txt" in refusal("compress", model, out, "--scheme", "toy", path=toy)
    assert files_of(out) == {"thesis.txt": b"mine"}


def test_a_finished_output_a_file_and_the_source_itself_are_not_written_over(
    tmp_path: Path, toy: Path
) -> None:
    model, out = write_model(tmp_path / "model"), tmp_path / "out"
    before = files_of(model)
    assert command("compress", model, out, "--scheme", "toy", path=toy).returncode == 0
    written = files_of(out)
    (tmp_path / "file").write_text("mine")
    for location, words in (
        (out, "already holds a model"),
        (tmp_path / "file", "is a file"),
        (model, "source"),
        (model / "o", "source"),
    ):
        assert words in refusal("compress", model, location, "--scheme", "toy", path=toy)
    assert files_of(out) == written
    assert files_of(model) == before
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() != 0, reason="making a small disk needs root")
def test_a_full_disk_is_told_and_the_run_goes_on_when_there_is_room(
    tmp_path: Path, toy: Path
) -> None:
    model, disk = write_model(tmp_path / "model", shards=3), tmp_path / "disk"
    out = disk / "out"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "none", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no small disk can be made here: {mounted.stderr.decode().strip()}")
    try:
        # room for one of three shards; the check of the space is passed, as where another program
        # fills the disk meanwhile
        (disk / "hog").write_bytes(b"x" * 1_800_000)
        assert "disk has" in refusal("compress", model, out, "--scheme", "toy", path=toy)
        with patch.object(shutil, "disk_usage", return_value=SimpleNamespace(free=10**9)):
            line = refusal("compress", model, out, "--scheme", "toy", path=toy)
        assert "the disk is full; make room and run the same command again" in line
        left = {file: file.stat().st_mtime_ns for file in out.glob("*.safetensors")}
        assert [file.name for file in left] == ["model-00001-of-00003.safetensors"]
        (disk / "hog").unlink()
        assert command("compress", model, out, "--scheme", "toy", path=toy).returncode == 0
        assert all(file.stat().st_mtime_ns == written for file, written in left.items())
        assert command("verify", out, "--against", model, path=toy).returncode == 0
    finally:
        subprocess.run(["umount", disk], check=True)
