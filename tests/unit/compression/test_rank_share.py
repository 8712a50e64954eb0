"""What a rank keeps where, with how much memory."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import attrs
import pytest
import torch
from fixtures.architectures import build
from fixtures.learner_scheme import install_learner, runnable_model

import bitpress
from bitpress.compression.calibration.rank_share import Budget, OwnBatches, Thrift
from bitpress.compression.resources import Resources
from bitpress.conformance.commands import plugins
from bitpress.numerics import kernel_trial
from bitpress.planning import memory_estimate, numbers_held, plan as plan_module
from bitpress.planning.plan import Plan
from bitpress.runtime import memory
from bitpress.runtime.process_group import SINGLE_PROCESS, ProcessGroup
from bitpress.schemes import pipeline

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
SAMPLES, LENGTH = 512, 32


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    folder = tmp_path_factory.mktemp("plan")
    with plugins(install_learner(folder / "plugins")):
        return bitpress.plan(runnable_model(folder / "model"), scheme="learner")


def split(plan: Plan, batch_tokens: int = memory_estimate.BATCH_TOKENS) -> OwnBatches:
    ids = torch.zeros(SAMPLES, LENGTH, dtype=torch.int64)
    return OwnBatches.of_rank(plan, ids, SINGLE_PROCESS, batch_tokens)


def test_a_gpu_keeps_hidden_states_then_forward_passes_as_far_as_there_is_room(
    plan: Plan,
) -> None:
    estimate = memory_estimate.estimate_device(plan, SAMPLES * LENGTH, LENGTH)
    forward = estimate.per_waiting_token * memory_estimate.BATCH_TOKENS
    host = memory.TRANSFORMERS_BYTES + 2 * (estimate.in_memory - estimate.on_disk)
    places = []
    for device_bytes, host_bytes in (
        (estimate.in_memory + 3 * forward, host),
        (estimate.in_memory, host),
        (estimate.in_memory - 1, host),
        (estimate.on_disk, host - 2),
    ):
        limits = Resources((GPU,), 1, host_bytes, device_bytes)
        budget = Budget.for_run(plan, split(plan), limits, Thrift(LENGTH))
        places.append((budget.states_device, budget.is_spilled, budget.max_resumable))
    waiting = (estimate.in_memory - 1 - estimate.on_disk) // forward
    assert places == [(GPU, False, 3), (GPU, False, 0), (CPU, False, waiting), (CPU, True, 0)]


def test_blocks_of_half_the_bytes_take_half_the_memory_of_a_gpu(plan: Plan) -> None:
    by_dtype = []
    for dtype in (torch.bfloat16, torch.float32):
        with patch.object(Plan, "dtype", dtype):
            by_dtype.append(memory_estimate.estimate_device(plan, 4096, LENGTH))
    states = [estimate.in_memory - estimate.on_disk for estimate in by_dtype]
    assert states[1] == pytest.approx(2 * states[0], rel=1e-6)
    assert by_dtype[0].on_disk < by_dtype[1].on_disk
    # what a CPU computes with lies where it is kept
    on_cpu = memory_estimate.estimate_calibration(plan, 4096, LENGTH)
    batch_bytes = 4 * memory_estimate.BATCH_TOKENS * plan.hidden_size
    ahead = numbers_held.num_blocks_held(plan) * batch_bytes
    assert by_dtype[1].on_disk - on_cpu.on_disk == ahead
    assert by_dtype[1].in_memory - on_cpu.in_memory == ahead


def test_the_memory_of_numba_is_counted_where_it_is_installed_and_rows_are_solved(
    plan: Plan,
) -> None:
    def needed_bytes(*, is_installed: bool) -> int:
        with patch.object(kernel_trial, "_is_installed", return_value=is_installed):
            return memory_estimate.estimate_memory(plan, shape=(SAMPLES, LENGTH))

    assert needed_bytes(is_installed=True) == (
        needed_bytes(is_installed=False) + kernel_trial.NUMBA_BYTES
    )
    with patch.object(pipeline, "takes_second_moments", return_value=False):
        assert needed_bytes(is_installed=True) == needed_bytes(is_installed=False)


def test_blocks_that_do_not_fit_a_gpu_are_brought_layer_by_layer(plan: Plan) -> None:
    tokens = SAMPLES * LENGTH
    whole = memory_estimate.estimate_device(plan, tokens, LENGTH)
    by_layer = memory_estimate.estimate_device(plan, tokens, LENGTH, by_layer=True)
    assert by_layer.on_disk < whole.on_disk
    budgets = [
        Budget.for_run(plan, split(plan), Resources((GPU,), 1, None, device_bytes), Thrift(LENGTH))
        for device_bytes in (whole.on_disk, whole.on_disk - 1, by_layer.on_disk)
    ]
    brought = memory_estimate.brought_bytes(plan)
    assert [budget.max_brought_bytes for budget in budgets] == [None, brought, brought]


def test_a_gpu_that_has_run_out_of_memory_keeps_nothing_then_runs_ever_smaller_batches_then_layers(
    plan: Plan,
) -> None:
    ids = torch.zeros(SAMPLES, LENGTH, dtype=torch.int64)
    thrift, steps = Thrift(memory_estimate.BATCH_TOKENS), []
    limits = Resources((GPU,), 1, None, 1 << 40)
    while (more := thrift.more(ids)) is not None:
        thrift = more
        batches = split(plan, thrift.batch_tokens)
        budget = Budget.for_run(plan, batches, limits, thrift)
        assert (budget.states_device, budget.max_resumable) == (CPU, 0)
        steps.append((batches.batches[0].numel(), budget.max_brought_bytes))
    brought = memory_estimate.brought_bytes(plan)
    whole = [(tokens, None) for tokens in (2048, 1024, 512, 256, 128, 64, 32)]
    assert steps == [*whole, (32, brought)]
    # of one sequence, no batch is smaller
    one = Thrift(memory_estimate.BATCH_TOKENS).more(ids[:1])
    assert one == Thrift(LENGTH, is_minimal=True)
    assert one.more(ids[:1]) == Thrift(LENGTH, is_minimal=True, by_layer=True)


def test_a_limit_leaves_room_to_holes_in_the_heap_where_all_forward_passes_may_wait_beside_them(
    plan: Plan,
) -> None:
    estimate = memory_estimate.estimate_calibration(plan, SAMPLES * LENGTH, LENGTH)
    held_bytes = estimate.in_memory + waiting_bytes(plan, estimate)
    num_forwards = SAMPLES * numbers_held.num_blocks_held(plan)
    cases = ((held_bytes, False), (2 * held_bytes - 1, False), (2 * held_bytes, True))
    for usable_bytes, is_ample in cases:
        resources = Resources((CPU,), 1, memory.TRANSFORMERS_BYTES + usable_bytes)
        budget = Budget.for_run(plan, split(plan, LENGTH), resources, Thrift(LENGTH))
        assert budget.is_ample == is_ample
        # a higher limit never has forward passes run again that a lower one lets wait
        assert budget.max_resumable >= num_forwards


def waiting_bytes(plan: Plan, estimate: memory_estimate.CalibrationMemory) -> int:
    """What all forward passes hold that wait inside a block, the source's too."""
    return SAMPLES * LENGTH * estimate.per_waiting_token * numbers_held.num_blocks_held(plan)


def test_experts_are_solved_side_by_side_by_all_lanes_of_all_ranks_as_far_as_there_is_room(
    tmp_path: Path,
) -> None:
    with plugins(install_learner(tmp_path / "plugins")):
        plan = bitpress.plan(build("qwen3_moe", tmp_path / "m"), scheme="learner")
    estimate = memory_estimate.estimate_calibration(plan, SAMPLES * LENGTH, LENGTH)
    # each token is sent to two of four
    assert plan.max_experts_together == 2
    for free_bytes, num_threads, num_ranks, expected in (
        (0, 1, 1, 1),
        (0, 2, 1, 1),
        (estimate.per_expert - 1, 2, 1, 1),
        (estimate.per_expert, 2, 1, 2),
        (estimate.per_expert, 1, 1, 2),
        (9 * estimate.per_expert, 4, 1, 2),
        (0, 1, 2, 2),
        (0, 1, 3, 2),
    ):
        group = ProcessGroup(0, num_ranks)
        held_bytes = estimate.in_memory + (num_threads - 1) * estimate.per_lane + free_bytes
        held_bytes += waiting_bytes(plan, estimate)
        # half of what is allowed is left to the heap's holes
        max_memory = memory.TRANSFORMERS_BYTES + 2 * held_bytes
        resources = Resources((CPU,), num_threads, max_memory, process_group=group)
        ids = torch.zeros(SAMPLES * num_ranks, LENGTH, dtype=torch.int64)
        own = OwnBatches.of_rank(plan, ids, group, memory_estimate.BATCH_TOKENS)
        budget = Budget.for_run(plan, own, resources, Thrift(LENGTH))
        assert budget.num_experts == expected


def test_a_thread_of_a_cpu_solves_experts_together_of_few_rows(tmp_path: Path) -> None:
    with plugins(install_learner(tmp_path / "plugins")):
        plan = bitpress.plan(build("qwen3_moe", tmp_path / "m"), scheme="learner")
    num_rows = max(stack.shape[0] for stack in plan.expert_stacks)
    # each token is sent to two of four
    for limit, expected in ((4 * num_rows, 2), (2 * num_rows, 2), (2 * num_rows - 1, 1), (1, 1)):
        with patch.object(plan_module, "ROWS_PER_BATCH", limit):
            assert attrs.evolve(plan).experts_per_batch == expected


def test_a_gpu_solves_as_many_experts_together_as_it_has_room_for(tmp_path: Path) -> None:
    with plugins(install_learner(tmp_path / "plugins")):
        plan = bitpress.plan(build("qwen3_moe", tmp_path / "m"), scheme="learner")
    tokens = SAMPLES * LENGTH
    estimate = memory_estimate.estimate_device(plan, tokens, LENGTH)
    for free_bytes, expected in ((0, 1), (estimate.per_expert - 1, 1), (estimate.per_expert, 2)):
        device_bytes = estimate.in_memory + waiting_bytes(plan, estimate) + free_bytes
        resources = Resources((GPU,), 1, None, device_bytes)
        budget = Budget.for_run(plan, split(plan, LENGTH), resources, Thrift(LENGTH))
        assert budget.num_experts == expected
    # forward passes that wait come first, and have what is left
    assert budget.max_resumable == SAMPLES * numbers_held.num_blocks_held(plan)
    thrifty = Budget.for_run(plan, split(plan), resources, Thrift(LENGTH, is_minimal=True))
    assert thrifty.num_experts == 1


def test_a_model_without_experts_solves_one_layer_group_at_a_time(plan: Plan) -> None:
    assert plan.max_experts_together == 1
    for num_ranks in (1, 4):
        resources = Resources((CPU,), 4, process_group=ProcessGroup(0, num_ranks))
        assert Budget.for_run(plan, split(plan), resources, Thrift(LENGTH)).num_experts == 1
