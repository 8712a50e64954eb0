"""One run in several processes that torchrun has started: the bytes of one process, whoever dies on
the way.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Literal

import pytest
import torch
from fixtures.forked import torchrun, torchrun_script
from fixtures.learner_scheme import CONFIG, install_learner, runnable_model
from fixtures.toy_scheme import install_deadly

import bitpress
from bitpress import DataError
from bitpress.checkpoint.filenames import BLOCK_RESULT_SUFFIX
from bitpress.conformance.commands import command, plugins
from bitpress.conformance.models import files_of, llama_tensors, tensors_of, write_model
from bitpress.planning.memory_estimate import BATCH_TOKENS, split_batches
from bitpress.runtime.process_group import ProcessGroup

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


def messages(completed: subprocess.CompletedProcess[str]) -> list[str]:
    """What our own processes have said on standard error; torchrun says more."""
    return [line for line in completed.stderr.splitlines() if line.startswith("bitpress: ")]


def cause(completed: subprocess.CompletedProcess[str]) -> tuple[int, int]:
    """The rank that torchrun names as the first to end, and its exit code."""
    text = completed.stderr.partition("Root Cause")[2]
    rank, code = re.search(r"rank +: (\d+)", text), re.search(r"exitcode +: (-?\d+)", text)
    assert rank, completed.stderr
    assert code, completed.stderr
    return int(rank[1]), int(code[1])


# --- how work is dealt
# ----------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_every_item_falls_to_one_rank_and_none_has_much_more_than_another(count: int) -> None:
    sizes = [5, 9, 1, 1, 30, 2, 8, 8, 8, 3, 0]
    shares = [
        ProcessGroup(rank, count).partition_by_size(list(enumerate(sizes)), lambda item: item[1])
        for rank in range(count)
    ]
    assert sorted(item for share in shares for item in share) == list(enumerate(sizes))
    assert all(share == sorted(share) for share in shares)
    loads = [sum(size for _, size in share) for share in shares]
    assert max(loads) - min(loads) <= max(sizes)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_neighbors_stay_together_and_parts_are_as_even_as_can_be(count: int) -> None:
    parts = [ProcessGroup(rank, count).partition_evenly("abcdefg") for rank in range(count)]
    assert [number for part in parts for number in part] == list(range(7))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


# --- without data
# ----------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3])
def test_several_processes_write_the_bytes_of_one_and_one_of_them_speaks(
    tmp_path: Path, model: Path, deadly: Path, expected: dict[str, bytes], count: int
) -> None:
    words = ["compress", model, tmp_path / "out", "--scheme", "toy", "--json"]
    # Three as torchrun itself starts them; the other tests fork them, to import torch once.
    ranks: Literal["fork", "new"] = "new" if count == 3 else "fork"
    completed = torchrun(count, *words, path=deadly, ranks=ranks)
    assert completed.returncode == 0, completed.stderr
    assert files_of(tmp_path / "out") == expected
    # one document
    assert json.loads(completed.stdout)["verified"] is True


def test_a_rank_that_is_killed_ends_the_run_which_goes_on_with_another_number_of_ranks(
    tmp_path: Path, model: Path, deadly: Path, expected: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    (deadly / "die").write_text(f"model.layers.1.self_attn.o_proj|{int(signal.SIGKILL)}")
    completed = torchrun(
        3, "compress", model, out, "--scheme", "toy", "--threads", "1", path=deadly
    )
    assert completed.returncode != 0
    assert len(messages(completed)) == 1, completed.stderr
    assert "the same command resumes" in messages(completed)[0]
    rank, code = cause(completed)
    assert code == -signal.SIGKILL
    assert rank in range(3)
    assert not (out / "config.json").exists()
    shards = {file.name: file.stat().st_ino for file in out.glob("*.safetensors")}
    (deadly / "die").unlink()
    completed = torchrun(
        2, "compress", model, out, "--scheme", "toy", "--threads", "1", path=deadly
    )
    assert completed.returncode == 0, completed.stderr
    assert files_of(out) == expected
    for name, number in shards.items():
        assert (out / name).stat().st_ino == number, "a finished shard was written again"


@pytest.mark.parametrize("fault", ["seen by all ranks, in the headers", "seen by one, in a number"])
def test_bad_input_is_told_once_in_one_line_and_ends_all_ranks(
    tmp_path: Path, deadly: Path, fault: str
) -> None:
    tensors = llama_tensors()
    words = "model.layers.1.mlp.down_proj"
    if "headers" in fault:
        tensors = {name: tensor for name, tensor in tensors.items() if "_proj" not in name}
        words = "layers"
    else:
        tensors[f"{words}.weight"][3, 5] = float("nan")
    model = write_model(tmp_path / "model", tensors, shards=3)
    command = ["compress", model, tmp_path / "out", "--scheme", "toy"]
    completed = torchrun(2, *command, path=deadly)
    assert completed.returncode != 0
    assert completed.stdout == ""
    assert len(messages(completed)) == 1, completed.stderr
    assert words in messages(completed)[0]
    assert cause(completed)[1] == 2
    # torchrun's: of a rank that is a fork of it, and its own
    assert completed.stderr.count("Traceback") == 2, completed.stderr
    assert not (tmp_path / "out/config.json").exists()


# --- with data
# ----------------------------------------------------------------------

# Every rank merges what it has seen; the owner's result is held against that of one process which
# has seen everything.
ADDING = """
import torch, torch.distributed as dist
from bitpress.compression.calibration.statistics import reduce_statistics
from bitpress.runtime.process_group import ProcessGroup
from bitpress.schemes import pipeline
from bitpress.schemes.values import Statistic

dist.init_process_group("gloo")
rank, count = dist.get_rank(), dist.get_world_size()
process_group = ProcessGroup(rank, count)

def seen(i):
    if i == 2:  # no token has come here
        return {}
    generator = torch.Generator().manual_seed(i)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    total = torch.tensor(float(i + 1))
    found = {"tokens": Statistic(total, "sum"), "again": Statistic(total, "sum"),
             "gram": Statistic(draw(3, 4).T, "sum", rows=True),
             "most": Statistic(draw(5) - 9, "max")}
    return found | ({"reference": Statistic(draw(2, 2), "sum")} if i == 1 else {})

expected = [{}, {}]
for i in range(count):
    pipeline.merge(expected[1], seen(i))
for owner in range(count):
    given = [{}, seen(rank)]
    found = reduce_statistics(process_group, given, owner, torch.device("cpu"))
    if rank != owner:
        assert found == [{}, {}]
        continue
    assert found[0] == {} and found[1].keys() == expected[1].keys(), found
    for name, stat in expected[1].items():
        torch.testing.assert_close(found[1][name].value, stat.value)
        assert (found[1][name].merge, found[1][name].rows) == (stat.merge, stat.rows)
for dtype in (torch.float8_e4m3fn, torch.uint8, torch.int8, torch.bfloat16, torch.float32):
    whole = torch.arange(12.).view(3, 4).to(dtype)
    for source in range(count):
        given = whole.clone() if rank == source else torch.empty_like(whole)
        assert torch.equal(process_group.broadcast(given, source).float(), whole.float())
    assert process_group.broadcast(torch.tensor(float(rank + 1)), count - 1) == count
mine = torch.full((2,), float(rank)) if rank < 2 else None
found = process_group.broadcast_from_last(mine, torch.device("cpu"))
assert torch.equal(found, torch.full((2,), float(min(count, 2) - 1)))
assert process_group.broadcast_from_last(None, torch.device("cpu")) is None
assert process_group.broadcast_object(rank, count - 1) == count - 1
dist.destroy_process_group()
"""


def test_statistics_of_all_ranks_add_up_to_those_of_one_process(tmp_path: Path) -> None:
    (tmp_path / "adding.py").write_text(ADDING)
    completed = torchrun_script(3, tmp_path / "adding.py")
    assert completed.returncode == 0, completed.stderr


AGREEING = """
import torch, torch.distributed as dist
from bitpress.runtime.process_group import AgreedOutOfMemoryError, ProcessGroup

dist.init_process_group("gloo")
rank, count = dist.get_rank(), dist.get_world_size()
process_group = ProcessGroup(rank, count)

def works(short_ranks):
    try:
        with process_group.agreeing():
            if rank in short_ranks:
                raise torch.OutOfMemoryError("CUDA out of memory")
    except AgreedOutOfMemoryError as e:
        return str(e)
    return "all go on"

assert works([]) == "all go on"
assert works([1]) == "rank 1: CUDA out of memory"
assert works([2, 1, 0]) == "rank 0: CUDA out of memory"
assert works([]) == "all go on"
dist.destroy_process_group()
"""


def test_where_one_rank_runs_out_of_memory_all_of_them_know(tmp_path: Path) -> None:
    (tmp_path / "agreeing.py").write_text(AGREEING)
    completed = torchrun_script(3, tmp_path / "agreeing.py")
    assert completed.returncode == 0, completed.stderr


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, its text, and runs: by one process, by two ranks, and by two of which
    one died in block 1.
    """
    folder = tmp_path_factory.mktemp("ranks")
    learner = install_learner(folder / "plugins")
    runnable_model(folder / "model", config=CONFIG | {"num_hidden_layers": 2})
    # as many tokens as are asked for: then the last sums of one process are the second rank's, of
    # whose texts some measure output errors
    numbers = random.Random(0).choices(range(96), k=252 * 48)
    (folder / "text.txt").write_text(" ".join(f"w{i}" for i in numbers))
    # the sixth stack is the second of block 1, and the second rank's
    deadly = folder / "kill.6"
    deadly.write_text("x" * 100)
    assert command(*words(folder, "alone"), path=learner).returncode == 0
    completed = torchrun(2, *words(folder, "two"), path=learner)
    assert completed.returncode == 0, completed.stderr
    deadly.unlink()
    completed = torchrun(2, *words(folder, "killed"), path=learner)
    assert completed.returncode != 0
    assert len(messages(completed)) == 1, completed.stderr
    assert cause(completed) == (1, -signal.SIGKILL)
    return folder


def words(folder: Path, out: str) -> list[object]:
    # six batches of 42 sequences, of which three are added up together
    return [
        "compress",
        folder / "model",
        folder / out,
        "--scheme",
        "learner",
        "--set",
        f"deadly={folder / 'kill.6'}",
        "--set",
        "bits=4",
        "--calibration",
        folder / "text.txt",
        "--samples",
        "252",
        "--sequence-length",
        "48",
        "--threads",
        "1",
    ]


def test_ranks_see_together_what_one_process_sees(calibrated: Path) -> None:
    alone, two = (tensors_of(calibrated / name) for name in ("alone", "two"))
    assert alone.keys() == two.keys()
    # what comes later depends on roundings, which sums in another order may turn
    for layer_name in ("q_proj", "k_proj", "v_proj"):
        layer = f"model.layers.0.self_attn.{layer_name}"
        assert torch.equal(alone[f"{layer}.weight"], two[f"{layer}.weight"])
    # and the means of the source's inputs beside them, of every eighth batch
    for name in ("seen", "weight_scale"):
        layer = f"model.layers.0.self_attn.o_proj.{name}"
        torch.testing.assert_close(alone[layer], two[layer], rtol=1e-3, atol=1e-2)
    assert alone["model.layers.0.self_attn.o_proj.seen"][1].norm() > 0.1


def test_the_quality_is_that_of_one_process(calibrated: Path) -> None:
    alone, two = (
        json.loads((calibrated / name / "bitpress.json").read_text()) for name in ("alone", "two")
    )
    assert list(two["blocks"].values()) == pytest.approx(list(alone["blocks"].values()), rel=0.01)
    for name, layer in two["layers"].items():
        assert layer["output_error"] == pytest.approx(
            alone["layers"][name]["output_error"], rel=0.01
        )
        assert layer["error"] == pytest.approx(alone["layers"][name]["error"], rel=0.01)
    with plugins(calibrated / "plugins"):
        text, model = calibrated / "text.txt", calibrated / "model"
        kl = [
            bitpress.eval(calibrated / name, text, model, max_tokens=4096).kl
            for name in ("alone", "two")
        ]
    assert kl[1] == pytest.approx(kl[0], rel=0.01)


@pytest.mark.parametrize("count", [2, 3])
def test_a_calibrated_run_goes_on_from_the_last_finished_block_with_any_number_of_ranks(
    calibrated: Path, count: int
) -> None:
    shutil.copytree(calibrated / "killed", out := calibrated / f"on-{count}")
    blocks = {file.name: file.read_bytes() for file in out.glob("*.safetensors")}
    # what is in no block, and block 0
    assert len(blocks) == 2
    assert not (out / "config.json").exists()
    completed = torchrun(count, *words(calibrated, out.name), path=calibrated / "plugins")
    assert completed.returncode == 0, completed.stderr
    for name, data in blocks.items():
        assert (out / name).read_bytes() == data
    # as if nothing had happened, and as in another run of as many ranks
    if count == 2:
        assert files_of(out) == files_of(calibrated / "two")
    drift = [
        list(json.loads((f / "bitpress.json").read_text())["blocks"].values())
        for f in (out, calibrated / "two")
    ]
    assert drift[0] == pytest.approx(drift[1], rel=0.05)


# The second of two ranks has too little memory once a block is finished: for more than 21 of 42
# sequences, or once for what it adds to the other's statistics, or gets of its solutions.
SHORT = f"""
import os
from pathlib import Path
import torch
from bitpress.cli import main
from bitpress.compression.calibration import solution, statistics
from bitpress.modeling.capture import BlockCall

owner, name = {{
    "batch": (BlockCall, "__call__"),
    "sum": (statistics, "_addend"),
    "solution": (solution, "_allocate_stored"),
}}[place]
work, once = getattr(owner, name), [True]

def short_of_memory(*arguments):
    is_second = any(Path(sys.argv[3]).glob("*{BLOCK_RESULT_SUFFIX}"))
    is_short = len(arguments[-1]) > 21 if place == "batch" else once
    if os.environ["RANK"] == "1" and is_second and is_short:
        once.clear()
        raise torch.OutOfMemoryError("CUDA out of memory")
    return work(*arguments)

setattr(owner, name, short_of_memory)
main()
"""


@pytest.mark.parametrize(
    ("place", "then"),
    # less is kept, and then a batch is smaller
    [("batch", ["2,048", "1,024"]), ("sum", ["2,048"]), ("solution", ["2,048"])],
)
def test_ranks_begin_a_block_again_together_where_one_runs_out_of_memory(
    calibrated: Path, place: str, then: list[str]
) -> None:
    arguments = list(map(str, words(calibrated, f"short-{place}")))
    script = calibrated / "short.py"
    start = f"import sys\nplace, sys.argv = {place!r}, {['bitpress', *arguments]!r}\n"
    script.write_text(start + SHORT)
    completed = torchrun_script(2, script, path=calibrated / "plugins")
    assert completed.returncode == 0, completed.stderr
    # once for all ranks
    said = re.findall("a rank's GPU has run out of memory.*with ([0-9,]+)", completed.stderr)
    assert said == then
    short, two = (
        json.loads((calibrated / name / "bitpress.json").read_text())
        for name in (f"short-{place}", "two")
    )
    for name, layer in two["layers"].items():
        assert short["layers"][name]["error"] == pytest.approx(layer["error"], rel=0.05)


def test_every_rank_has_a_batch_and_more_ranks_than_sequences_are_refused() -> None:
    ids = torch.arange(7 * 1000).view(7, 1000)
    assert [len(batch) for batch in split_batches(ids, 1, BATCH_TOKENS)] == [2, 2, 2, 1]
    for count in range(1, 8):
        assert torch.equal(torch.cat(list(result := split_batches(ids, count, BATCH_TOKENS))), ids)
        assert all(len(ProcessGroup(rank, count).partition_evenly(result)) for rank in range(count))
    with pytest.raises(DataError, match="7 calibration sequences for 8 ranks"):
        split_batches(ids, 8, BATCH_TOKENS)
