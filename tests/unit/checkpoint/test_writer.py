"""Where the output goes: nothing of anybody else's is written over, and a full disk is told."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest

from bitpress.checkpoint.filenames import LOCK
from bitpress.checkpoint.lock import lock_folder
from bitpress.checkpoint.writer import OutputFolder
from bitpress.conformance.commands import command, refusal
from bitpress.conformance.models import files_of, llama_tensors, write_model
from bitpress.errors import OutputError


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
    other = write_model(tmp_path / "other", llama_tensors(seed=1))
    assert "already holds a model" in refusal("compress", other, out, "--scheme", "toy", path=toy)
    for location, words in (
        (tmp_path / "file", "is a file"),
        (model, "source"),
        (model / "o", "source"),
    ):
        assert words in refusal("compress", model, location, "--scheme", "toy", path=toy)
    assert files_of(out) == written
    assert files_of(model) == before
    assert (tmp_path / "file").read_text() == "mine"


# --- links that lead out of the folder
# ----------------------------------------------------------------------

NAMES = [
    "model.safetensors",
    "model.safetensors.part",
    "model.safetensors.0123cdef.part",
    "config.json",
    "tokenizer_config.json",
    "bitpress.json",
    ".bitpress.lock",
    ".bitpress.run",
]


@pytest.mark.parametrize("link", [os.symlink, os.link], ids=["a link", "a hard link"])
@pytest.mark.parametrize("name", NAMES)
def test_a_link_in_the_output_folder_changes_no_file_outside(
    tmp_path: Path, toy: Path, name: str, link: Callable[[Path, Path], None]
) -> None:
    model, out, victim = write_model(tmp_path / "model"), tmp_path / "out", tmp_path / "victim"
    victim.write_text("mine")
    out.mkdir()
    link(victim, out / name)
    line = refusal("compress", model, out, "--scheme", "toy", path=toy)
    assert f"{out / name}: it is a" in line or "already holds a model" in line, line
    assert victim.read_text() == "mine"
    assert os.listdir(out) == [name]


def test_a_folder_of_the_output_that_is_a_link_is_not_written_into(
    tmp_path: Path, toy: Path
) -> None:
    model, out, outside = write_model(tmp_path / "model"), tmp_path / "out", tmp_path / "outside"
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates/tool.jinja").write_text("hello")
    outside.mkdir()
    out.mkdir()
    (out / "additional_chat_templates").symlink_to(outside)
    line = refusal("compress", model, out, "--scheme", "toy", path=toy)
    assert "additional_chat_templates: it is a link" in line
    assert os.listdir(outside) == []


def test_a_link_that_comes_while_the_run_lasts_is_not_followed(tmp_path: Path) -> None:
    outside, output = tmp_path / "outside", OutputFolder(tmp_path / "out")
    outside.mkdir()
    output.write_text("a.txt", "ours")
    (tmp_path / "out/sub").symlink_to(outside)
    (tmp_path / "out/b.txt").symlink_to(outside / "b.txt")
    for name in ("sub/x", "b.txt"):
        with pytest.raises(OutputError, match="it is a link"):
            output.write_text(name, "ours")
    assert os.listdir(outside) == []


def test_an_output_folder_that_the_user_names_by_a_link_is_written_into(
    tmp_path: Path, toy: Path
) -> None:
    model, disk = write_model(tmp_path / "model"), tmp_path / "disk"
    disk.mkdir()
    (tmp_path / "out").symlink_to(disk)
    assert command("compress", model, tmp_path / "out", "--scheme", "toy", path=toy).returncode == 0
    assert (disk / "config.json").exists()


def test_no_page_is_written_through_a_link(tmp_path: Path, toy: Path) -> None:
    model, out, victim = write_model(tmp_path / "model"), tmp_path / "out", tmp_path / "victim"
    assert command("compress", model, out, "--scheme", "toy", path=toy).returncode == 0
    victim.write_text("mine")
    (tmp_path / "page.html.part").symlink_to(victim)
    words = ["report", out, "--html", tmp_path / "page.html"]
    assert command(*words, path=toy).returncode == 0
    assert victim.read_text() == "mine"


def test_the_lock_s_file_is_not_written_through_a_link(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    os.link(victim, tmp_path / LOCK)
    with lock_folder(tmp_path):
        assert victim.read_text() == "mine"
    (tmp_path / LOCK).symlink_to(victim)
    with pytest.raises(OSError, match="symbolic link"), lock_folder(tmp_path):
        pass
    assert victim.read_text() == "mine"


def test_what_a_killed_run_left_unfinished_is_removed_and_nothing_else(
    tmp_path: Path, toy: Path
) -> None:
    model, out = write_model(tmp_path / "model"), tmp_path / "out"
    out.mkdir()
    for name in ("model.safetensors", ".bitpress.run", "tokenizer_config.json"):
        (out / f"{name}.0123cdef.part").write_text("half")
    assert command("compress", model, out, "--scheme", "toy", path=toy).returncode == 0
    assert not list(out.glob("*.part"))
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.0123cdef.part").write_text("mine")
    assert "it holds thesis.0123cdef.part" in refusal(
        "compress", model, other, "--scheme", "toy", path=toy
    )
    assert files_of(other) == {"thesis.0123cdef.part": b"mine"}


# --- permissions
# ----------------------------------------------------------------------


def test_nobody_may_read_an_output_who_may_not_read_its_source(tmp_path: Path, toy: Path) -> None:
    model, out, dense = write_model(tmp_path / "model"), tmp_path / "out", tmp_path / "dense"
    (model / "model.safetensors").chmod(0o600)
    (model / "tokenizer_config.json").chmod(0o640)
    model.chmod(0o750)
    assert command("compress", model, out, "--scheme", "toy", path=toy).returncode == 0
    assert command("decompress", out, dense, path=toy).returncode == 0
    for folder in (out, dense):
        modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()}
        assert stat.S_IMODE(folder.stat().st_mode) == 0o750
        assert modes.pop("tokenizer_config.json") == 0o640
        assert set(modes.values()) == {0o600}


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
