"""One run in several processes that torchrun has started: the bytes of one process, whoever dies on the way."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from pathlib import Path

import pytest
from support import files_of, install_deadly, llama_tensors, plugins, torchrun, write_model

import bitpress
from bitpress.ranks import Ranks

SHARDS = 5


@pytest.fixture
def deadly(tmp_path: Path) -> Path:
    return install_deadly(tmp_path / "deadly")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model", shards=SHARDS)


@pytest.fixture
def expected(tmp_path: Path, model: Path, deadly: Path) -> dict[str, bytes]:
    """What one process writes."""
    with plugins(deadly):
        bitpress.compress(model, tmp_path / "alone", scheme="toy", threads=1)
    return files_of(tmp_path / "alone")


def told(found: subprocess.CompletedProcess[str]) -> list[str]:
    """What our own processes have said on standard error; torchrun says more."""
    return [line for line in found.stderr.splitlines() if line.startswith("bitpress: ")]


def cause(found: subprocess.CompletedProcess[str]) -> tuple[int, int]:
    """The rank that torchrun names as the first to end, and its exit code."""
    text = found.stderr.partition("Root Cause")[2]
    rank, code = re.search(r"rank +: (\d+)", text), re.search(r"exitcode +: (-?\d+)", text)
    assert rank, found.stderr
    assert code, found.stderr
    return int(rank[1]), int(code[1])


# --- how work is dealt ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_every_item_falls_to_one_rank_and_none_has_much_more_than_another(count: int) -> None:
    sizes = [5, 9, 1, 1, 30, 2, 8, 8, 8, 3, 0]
    shares = [Ranks(rank, count).deal(list(enumerate(sizes)), lambda item: item[1]) for rank in range(count)]
    assert sorted(item for share in shares for item in share) == list(enumerate(sizes))
    assert all(share == sorted(share) for share in shares)
    loads = [sum(size for _, size in share) for share in shares]
    assert max(loads) - min(loads) <= max(sizes)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_neighbours_stay_together_and_parts_are_as_even_as_can_be(count: int) -> None:
    parts = [Ranks(rank, count).part("abcdefg") for rank in range(count)]
    assert [place for part in parts for place in part] == list(range(7))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


# --- without data ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3])
def test_several_processes_write_the_bytes_of_one_and_one_of_them_speaks(
    tmp_path: Path, model: Path, deadly: Path, expected: dict[str, bytes], count: int
) -> None:
    found = torchrun(count, "compress", model, tmp_path / "out", "--scheme", "toy", "--json", path=deadly)
    assert found.returncode == 0, found.stderr
    assert files_of(tmp_path / "out") == expected
    assert json.loads(found.stdout)["verified"] is True  # one document


def test_a_rank_that_is_killed_ends_the_run_which_goes_on_with_another_number_of_ranks(
    tmp_path: Path, model: Path, deadly: Path, expected: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    (deadly / "die").write_text(f"model.layers.1.self_attn.o_proj|{int(signal.SIGKILL)}")
    found = torchrun(3, "compress", model, out, "--scheme", "toy", "--threads", "1", path=deadly)
    assert found.returncode != 0
    assert len(told(found)) == 1, found.stderr
    assert "the same command goes on" in told(found)[0]
    rank, code = cause(found)
    assert code == -signal.SIGKILL
    assert rank in range(3)
    assert not (out / "config.json").exists()
    shards = {file.name: file.stat().st_ino for file in out.glob("*.safetensors")}
    (deadly / "die").unlink()
    found = torchrun(2, "compress", model, out, "--scheme", "toy", "--threads", "1", path=deadly)
    assert found.returncode == 0, found.stderr
    assert files_of(out) == expected
    for name, number in shards.items():
        assert (out / name).stat().st_ino == number, "a finished shard was written again"


@pytest.mark.parametrize("fault", ["seen by all ranks, in the headers", "seen by one, in a number"])
def test_bad_input_is_told_once_in_one_line_and_ends_all_ranks(tmp_path: Path, deadly: Path, fault: str) -> None:
    tensors = llama_tensors()
    words = "model.layers.1.mlp.down_proj"
    if "headers" in fault:
        tensors = {name: tensor for name, tensor in tensors.items() if "_proj" not in name}
        words = "layers"
    else:
        tensors[f"{words}.weight"][3, 5] = float("nan")
    model = write_model(tmp_path / "model", tensors, shards=3)
    found = torchrun(2, "compress", model, tmp_path / "out", "--scheme", "toy", path=deadly)
    assert found.returncode != 0
    assert found.stdout == ""
    assert len(told(found)) == 1, found.stderr
    assert words in told(found)[0]
    assert cause(found)[1] == 2
    assert found.stderr.count("Traceback") == 1, found.stderr  # torchrun's own
    assert not (tmp_path / "out/config.json").exists()
