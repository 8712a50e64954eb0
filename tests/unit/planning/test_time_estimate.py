"""What a plan says that each rank will read, write, hold and compute is what the ranks of a run
then do.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal
from unittest.mock import patch

import pytest
from fixtures.architectures import build
from fixtures.forked import torchrun
from fixtures.learner_scheme import CONFIG, LEARNER, install_learner, runnable_model
from fixtures.toy_scheme import TOY
from torch.utils.flop_counter import FlopCounterMode

import bitpress
from bitpress.conformance.commands import command, install, plugins
from bitpress.conformance.models import write_model
from bitpress.numerics import gram
from bitpress.planning import memory_estimate, time_estimate
from bitpress.planning.calibration_config import CalibrationConfig
from bitpress.planning.plan import Plan

# Every rank counts the bytes of tensors that it reads and writes, and the most memory that it held,
# and tells them at its end.
COUNTING = r"""
import json, os, pathlib, re
from multiprocessing.util import Finalize
rank, found = os.environ.get("RANK"), {"reads": 0, "writes": 0}
preadv, pwrite = os.preadv, os.pwrite

def reading(*arguments):
    count = preadv(*arguments)
    found["reads"] += count
    return count

def writing(descriptor, *arguments):
    count = pwrite(descriptor, *arguments)
    file = os.readlink(f"/proc/self/fd/{descriptor}")
    found["writes"] += count * bool(re.search(r"\.safetensors\.[0-9a-f]+\.part$", file))
    return count

def tell():
    status = pathlib.Path("/proc/self/status").read_text()
    found["memory"] = int(status.partition("VmHWM:")[2].split()[0]) * 1024
    pathlib.Path(__file__).with_name("rank" + rank).write_text(json.dumps(found))

if rank is not None:
    os.preadv, os.pwrite = reading, writing
    Finalize(None, tell, exitpriority=0)
"""


def counting(folder: Path, name: str, module: str) -> Path:
    """A scheme whose ranks count."""
    return install(
        folder,
        f"bitpress-scheme-{name}",
        module + COUNTING,
        f"[bitpress.schemes]\n{name} = bitpress_scheme_{name}\n",
    )


def counted(folder: Path, ranks: int) -> list[dict[str, int]]:
    return [json.loads((folder / f"rank{rank}").read_text()) for rank in range(ranks)]


@pytest.mark.parametrize(("shards", "ranks"), [(5, 2), (5, 3), (1, 2)])
def test_data_free_ranks_read_and_write_the_bytes_that_were_planned(
    tmp_path: Path, shards: int, ranks: int
) -> None:
    model, path = (
        write_model(tmp_path / "model", shards=shards),
        counting(tmp_path / "plugins", "toy", TOY),
    )
    words = [model, "--scheme", "toy", "--threads", 1]
    planned = json.loads(command("plan", *words, "--world-size", ranks, "--json", path=path).stdout)
    run_words = ["compress", model, tmp_path / "out", *words[1:], "--no-verify"]
    completed = torchrun(ranks, *run_words, path=path)
    assert completed.returncode == 0, completed.stderr
    assert planned["world_size"] == ranks
    ran = counted(path, ranks)
    assert [(r["reads"], r["writes"]) for r in ran] == [
        (r["reads"], r["writes"]) for r in planned["ranks"]
    ]
    assert max(r["memory"] for r in ran) <= planned["memory"]


# A fork maps less of the libraries than a new process, which is what memory is planned for: those
# with most samples, and so with most memory, are new.
@pytest.mark.parametrize(("samples", "ranks", "kind"), [(100, 2, "new"), (3, 3, "fork")])
def test_calibrated_ranks_read_write_and_hold_what_was_planned(
    tmp_path: Path, samples: int, ranks: int, kind: Literal["fork", "new"]
) -> None:
    model, path = (
        runnable_model(tmp_path / "model"),
        counting(tmp_path / "plugins", "learner", LEARNER),
    )
    with plugins(path):
        plan = bitpress.plan(model, scheme="learner")
        planned = time_estimate.estimate_ranks(
            plan, ranks, CalibrationConfig(samples=samples, sequence_length=48)
        )
        limit = memory_estimate.estimate_memory(plan, 1)
    words = ["compress", model, tmp_path / "out", "--scheme", "learner"]
    words += ["--calibration", tmp_path / "text.txt", "--samples", samples]
    words += ["--sequence-length", 48, "--threads", 1, "--no-verify"]
    words += ["--max-memory", f"{limit / 1e6}MB"]
    completed = torchrun(ranks, *words, path=path, ranks=kind)
    assert completed.returncode == 0, completed.stderr
    ran = counted(path, ranks)
    assert [r["writes"] for r in ran] == [share.writes for share in planned]
    # which is copied and, alone of what is in no block, not run
    norm = plan.source.entries["model.norm.weight"].nbytes
    assert [r["reads"] + norm for r in ran] == [share.reads for share in planned]
    assert max(r["memory"] for r in ran) <= limit
    assert sum(share.tokens for share in planned) == samples * 48


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_operations_on_tokens_are_those_that_torch_counts(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for attention itself, the tokens that errors are measured on, and fits: a fifth in models
    as small as these.
    """
    # products of codes it does not count
    monkeypatch.setattr(gram, "INT8_INSTRUCTIONS", ())
    model = (
        runnable_model(tmp_path / "model", config=CONFIG)
        if family == "llama"
        else build(family, tmp_path / "model")
    )
    choice = CalibrationConfig(str(tmp_path / "text.txt"), samples=240, sequence_length=32)
    with plugins(install_learner(tmp_path / "plugins")):
        plan = bitpress.plan(model, scheme="learner")
        with FlopCounterMode(display=False) as counter:
            bitpress.compress(
                model,
                tmp_path / "out",
                scheme="learner",
                calibration=choice.source,
                samples=choice.samples,
                sequence_length=choice.sequence_length,
                threads=1,
                verify=False,
            )
    (share,) = time_estimate.estimate_ranks(plan, 1, choice)
    assert share.products == pytest.approx(counter.get_total_flops(), rel=0.2)


def test_what_ranks_do_together_is_what_one_does(tmp_path: Path, with_toy: Path) -> None:
    plan = bitpress.plan(write_model(tmp_path / "model", shards=5), scheme="toy")
    (alone,) = time_estimate.estimate_ranks(plan, 1)
    for count in (2, 3, 8):
        result = time_estimate.estimate_ranks(plan, count)
        assert sum(share.reads for share in result) == alone.reads
        assert sum(share.writes for share in result) == alone.writes


def test_more_ranks_take_less_time_but_for_fits_which_all_wait_for(tmp_path: Path) -> None:
    model = runnable_model(tmp_path / "model")
    with plugins(install_learner(tmp_path / "plugins")):
        plan = bitpress.plan(model, scheme="learner")
        result = [time_estimate.estimate_ranks(plan, count) for count in (1, 2, 4, 8)]
    times = [time_estimate.estimate_seconds(shares, 1) for shares in result]
    fits = [sum(share.solutions for share in shares) for shares in result]
    assert times == sorted(times, reverse=True)
    assert fits == pytest.approx([fits[0]] * 4)
    columns = [sum(share.columns for share in shares) for shares in result]
    assert columns == [columns[0]] * 4
    one_by_one = columns[0] * time_estimate.COLUMN_SECONDS
    assert times[-1] > fits[0] / time_estimate.SOLVE_RATE + one_by_one


def test_threads_share_what_is_done_on_tokens_and_the_tiles_of_rows_of_fits() -> None:
    tokens_alone = time_estimate.RankWork(0, 0, 0, products=10**13)
    fits_alone = time_estimate.RankWork(0, 0, 0, solutions_by_tiles={1: 10**12, 3: 6 * 10**12})
    columns_alone = time_estimate.RankWork(0, 0, 0, columns=10**6)
    for threads in (1, 2, 3, 16):
        assert time_estimate.estimate_seconds([tokens_alone], threads) == pytest.approx(
            10**13 / time_estimate.PRODUCT_RATE / threads
        )
        assert time_estimate.estimate_seconds([fits_alone], threads) == pytest.approx(
            (1 + 6 / min(threads, 3)) * 10**12 / time_estimate.SOLVE_RATE
        )
        assert time_estimate.estimate_seconds([columns_alone], threads) == pytest.approx(
            10**6 * time_estimate.COLUMN_SECONDS
        )


def test_ranks_and_threads_share_the_experts_of_a_block() -> None:
    operations, columns = 10**12, 10**6
    work = time_estimate.RankWork(
        0, 0, 0, columns=columns, expert_solutions={8: operations}, expert_columns={8: columns}
    )
    for num_ranks, threads in ((1, 1), (1, 4), (2, 1), (2, 3), (4, 4), (16, 1)):
        assert time_estimate.estimate_seconds([work] * num_ranks, threads) == pytest.approx(
            num_ranks * operations / min(num_ranks * threads, 8) / time_estimate.SOLVE_RATE
            + num_ranks * columns / min(num_ranks, 8) * time_estimate.COLUMN_SECONDS
        )


def test_what_is_fitted_of_experts_is_counted_apart(tmp_path: Path) -> None:
    with plugins(install_learner(tmp_path / "plugins")):
        plan = bitpress.plan(build("mixtral", tmp_path / "model"), scheme="learner")
    calibration = CalibrationConfig(samples=300, sequence_length=32)
    for num_ranks in (1, 2):
        for work in time_estimate.estimate_ranks(plan, num_ranks, calibration):
            # two of four experts are sent a token
            assert list(work.expert_solutions) == list(work.expert_columns) == [2]
            assert 0 < work.expert_columns[2] < work.columns
            assert work.solutions == work.expert_solutions[2] + sum(
                work.solutions_by_tiles.values()
            )


def test_columns_of_experts_in_a_batch_are_decided_at_once(tmp_path: Path) -> None:
    with plugins(install_learner(tmp_path / "plugins")):
        plan = bitpress.plan(build("mixtral", tmp_path / "model"), scheme="learner")
    calibration, columns = CalibrationConfig(samples=300, sequence_length=32), []
    for per_batch in (1, 2):
        with patch.object(Plan, "experts_per_batch", per_batch):
            (work,) = time_estimate.estimate_ranks(plan, 1, calibration)
        columns.append((work.expert_columns[2], work.columns - work.expert_columns[2]))
    (alone, others), together = columns
    assert together == (alone / 2, others)


def test_experts_that_few_tokens_reach_are_not_fitted(tmp_path: Path) -> None:
    with plugins(install_learner(tmp_path / "plugins")):
        plan = bitpress.plan(build("mixtral", tmp_path / "model"), scheme="learner")
        few, many = (
            time_estimate.estimate_ranks(
                plan, 1, CalibrationConfig(samples=samples, sequence_length=32)
            )[0]
            for samples in (3, 300)
        )
    # of 96 tokens 48 come to each of four experts, and 64 are wanted
    assert few.solutions < many.solutions


@pytest.mark.parametrize(("family", "share"), [("qwen3", 1.0), ("mixtral", 0.5)])
def test_the_layer_that_gets_the_fewest_tokens_says_how_many_go_through_the_source_too(
    tmp_path: Path, family: str, share: float
) -> None:
    with plugins(install_learner(tmp_path / "plugins")):
        plan = bitpress.plan(build(family, tmp_path / "model"), scheme="learner")
    # the second layers of MLPs and of experts are the widest
    widest = max(plan.stacks, key=lambda stack: stack.shape[1])
    assert widest.name.endswith(("down_proj", ".w2"))
    num_tokens = memory_estimate.REFERENCE_TOKENS_PER_CHANNEL * widest.shape[1] * 8
    assert memory_estimate.reference_interval(plan, num_tokens) == 8 * share
