"""Whatever the disk does at whatever call: afterwards the folder is whole, or is resumed to the
same bytes, and never looks finished when it is not.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
from pathlib import Path
from typing import Any

import pytest
from fixtures.faulty_disk import FaultyDisk, PowerLoss

import bitpress
from bitpress.checkpoint.filenames import CONFIG, LOCK, RUN_RECORD
from bitpress.conformance.models import LLAMA, files_of, llama_tensors, write_model

# Of the calls of a run, each so-manieth is made to fail; with `-m long` every one.
STRIDES = [
    pytest.param(5, id="some calls"),
    pytest.param(1, id="every call", marks=pytest.mark.long),
]
MODEL_CONFIG = LLAMA | {"num_hidden_layers": 1}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = write_model(
        tmp_path / "model", llama_tensors(config=MODEL_CONFIG), MODEL_CONFIG, shards=2
    )
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/rag.jinja").write_text("{{ messages }}")
    return folder


@pytest.fixture
def expected(model: Path, with_toy: Path, tmp_path: Path) -> dict[str, bytes]:
    compress(model, tmp_path / "expected")
    return files_of(tmp_path / "expected")


def compress(model: Path, out: Path) -> None:
    bitpress.compress(model, out, scheme="toy", threads=1)


def count_calls(model: Path, folder: Path) -> int:
    disk = FaultyDisk(folder / "out")
    with disk.mounted():
        compress(model, folder / "out")
    return disk.num_calls


def require_whole_or_resumed(model: Path, out: Path, expected: dict[str, bytes]) -> None:
    if (out / CONFIG).exists() and not (out / RUN_RECORD).exists():
        # the file of a lock that nobody holds hinders nobody
        (out / LOCK).unlink(missing_ok=True)
        assert files_of(out) == expected, "it looks finished, and is not"
        return
    compress(model, out)
    assert files_of(out) == expected


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("kind", ["all that is not safe is lost", *map(str, range(3))])
def test_after_a_power_loss_at_any_call_the_folder_is_whole_or_resumed_to_the_same_bytes(
    model: Path,
    expected: dict[str, bytes],
    tmp_path: Path,
    kind: str,
    stride: int,
) -> None:
    def lose_power(number: int, name: str, arguments: tuple[Any, ...]) -> None:
        if number == last:
            raise PowerLoss

    for last in range(1, count_calls(model, tmp_path / "counted") + 1, stride):
        out = tmp_path / str(last) / "out"
        disk = FaultyDisk(out, lose_power)
        with disk.mounted(), contextlib.suppress(PowerLoss):
            compress(model, out)
        if not out.exists():
            continue
        disk.restart(random.Random(f"{kind} {last}") if kind.isdigit() else None)
        require_whole_or_resumed(model, out, expected)


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("error", ["EIO", "ENOSPC", "EINTR", "EDQUOT", "EROFS"])
def test_a_call_that_fails_ends_the_run_and_the_same_command_makes_the_same_bytes(
    model: Path,
    expected: dict[str, bytes],
    tmp_path: Path,
    error: str,
    stride: int,
) -> None:
    number_of_error = getattr(errno, error)

    def fail(number: int, name: str, arguments: tuple[Any, ...]) -> None:
        if number == last:
            raise OSError(number_of_error, os.strerror(number_of_error))

    for last in range(1, count_calls(model, tmp_path / "counted") + 1, stride):
        out = tmp_path / str(last) / "out"
        with FaultyDisk(out, fail).mounted(), contextlib.suppress(bitpress.OutputError):
            compress(model, out)
        require_whole_or_resumed(model, out, expected)


@pytest.mark.parametrize("size", [1, 4096])
def test_short_writes_change_no_byte(
    model: Path, expected: dict[str, bytes], tmp_path: Path, size: int
) -> None:
    def cut(number: int, name: str, arguments: tuple[Any, ...]) -> int | None:
        return size if name == "pwrite" and number % 5 == 0 and len(arguments[1]) > size else None

    with FaultyDisk(tmp_path / "out", cut).mounted():
        compress(model, tmp_path / "out")
    assert files_of(tmp_path / "out") == expected


def test_a_disk_that_takes_nothing_and_says_nothing_is_not_waited_for(
    model: Path, with_toy: Path, tmp_path: Path
) -> None:
    def take_nothing(number: int, name: str, arguments: tuple[Any, ...]) -> int | None:
        return 0 if name == "pwrite" else None

    disk = FaultyDisk(tmp_path / "out", take_nothing)
    with disk.mounted(), pytest.raises(bitpress.OutputError, match="disk is full"):
        compress(model, tmp_path / "out")
