"""Memory that a search needs, and what it keeps where."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from attrs import frozen

from bitpress.checkpoint.reader import Reader
from bitpress.compression.search.search_job import SearchJob, split_sequences
from bitpress.errors import OutputError, RecipeError
from bitpress.modeling.block_runner import RunnableModel
from bitpress.output import evaluation_memory
from bitpress.planning import memory_estimate, numbers_held
from bitpress.planning.memory_estimate import CalibrationMemory
from bitpress.runtime import devices, memory


@frozen
class MeasurementMemory:
    """What a measurement may hold.

    Attributes:
        folder: where hidden states are kept; None keeps them in memory.
        num_waiting: how many forwards may wait inside a block.
        num_lanes: batches that are run side by side.
        max_brought_bytes: as a `DecoderOptions` has it.
    """

    folder: Path | None
    num_waiting: int
    num_lanes: int
    max_brought_bytes: int | None = None


def plan_memory(
    job: SearchJob,
    folder: Path,
    device: torch.device,
    max_memory: int | None,
    num_threads: int,
) -> MeasurementMemory:
    """Whether hidden states are kept in memory or in that folder, how many batches run side by
    side, how many forwards wait, and where blocks lie.

    Args:
        device: that computes.
        max_memory: bytes of the process; None: half of what is free.
        num_threads: that may run batches side by side where this is a CPU.

    Raises:
        BitpressError: there is no room for hidden states, or `max_memory` is too low in any case.
    """
    needed_bytes, estimates = _estimate_measuring(job)
    min_bytes = memory.TRANSFORMERS_BYTES + needed_bytes
    if max_memory is None:
        max_bytes = memory.TRANSFORMERS_BYTES + memory.available_bytes() // 2
    elif max_memory < min_bytes:
        raise RecipeError(memory.describe_shortage("the search", min_bytes, max_memory))
    else:
        max_bytes = max_memory

    states_bytes = _count_states_bytes(job)
    is_spilled = min_bytes + states_bytes > max_bytes
    if is_spilled and (free := shutil.disk_usage(folder).free) < states_bytes:
        raise OutputError(
            f"{folder}: {states_bytes / 1e9:.2f} GB of hidden states go there, and "
            f"{free / 1e9:.2f} GB are free"
        )
    free_bytes = max_bytes - min_bytes - (0 if is_spilled else states_bytes)
    # a further batch in a block, or while predictions are compared
    logits = evaluation_memory.LOGITS_TENSORS * memory_estimate.MAX_LOGITS
    in_block = max([estimate.per_lane for estimate in estimates], default=needed_bytes)
    lane_bytes = max(in_block, memory_estimate.NUMBER_BYTES * logits)
    num_lanes = min(1 + max(free_bytes, 0) // lane_bytes, num_threads)
    free_bytes -= (num_lanes - 1) * lane_bytes
    states_folder = folder if is_spilled else None
    if device.type != "cpu":
        return _plan_device_memory(job, device, states_folder)
    return MeasurementMemory(states_folder, _count_waiting(estimates, free_bytes), num_lanes)


def _plan_device_memory(
    job: SearchJob, device: torch.device, states_folder: Path | None
) -> MeasurementMemory:
    """What a measurement may hold on a GPU: blocks lie there, or in the host's memory where they do
    not fit; forwards wait in what is left.
    """
    max_bytes, brought_bytes = devices.usable_memory(device), None
    needed_bytes, estimates = _estimate_measuring(job)
    if needed_bytes > max_bytes:
        needed_bytes, estimates = _estimate_measuring(job, by_layer=True)
        devices.require_memory(device, needed_bytes)
        largest_stack = max(math.prod(shape) for shape in _stack_shapes(job))
        brought_bytes = memory_estimate.NUMBER_BYTES * largest_stack
    num_waiting = _count_waiting(estimates, max_bytes - needed_bytes)
    return MeasurementMemory(states_folder, num_waiting, 1, brought_bytes)


def _estimate_measuring(
    job: SearchJob, *, by_layer: bool = False
) -> tuple[int, list[CalibrationMemory]]:
    """Bytes that a search holds where it computes, beside what waits; and what each calibrated
    candidate takes.

    Args:
        by_layer: whether there is one layer group of a block at a time.
    """
    length = job.calibration.input_ids.shape[1]
    with Reader() as reader:
        model = RunnableModel(job.plan.source, reader, job.plan.container)
        # a block as it was, and as it becomes
        running_bytes = 2 * evaluation_memory.estimate_computing([model], length, by_layer=by_layer)
    solutions = (numbers_held.count_solution(*shape, 0) for shape in _stack_shapes(job))
    solving_bytes = memory_estimate.NUMBER_BYTES * max(solutions)
    # what is stored of a rounded head or of embeddings goes when Python collects its garbage
    running_bytes += sum(
        memory_estimate.tile_bytes() + unit.num_bytes(trial)
        for unit in job.units
        if unit.block is None
        for trial in unit.trials
    )
    estimates = [
        memory_estimate.estimate_calibration(plan, 0, length, by_layer=by_layer)
        for plan in job.plans.values()
        if plan.calibrated
    ]
    fitting_bytes = [solving_bytes, *(estimate.on_disk for estimate in estimates)]
    return max(running_bytes, *fitting_bytes), estimates


def _stack_shapes(job: SearchJob) -> Iterator[tuple[int, int]]:
    """(out, in) of every stack of every candidate."""
    return (stack.shape for plan in job.plans.values() for stack in plan.stacks)


def _count_waiting(estimates: Sequence[CalibrationMemory], free_bytes: int) -> int:
    """How many forwards may wait inside a block in so many bytes."""
    waiting = [
        estimate.num_waiting(free_bytes, memory_estimate.BATCH_TOKENS) for estimate in estimates
    ]
    return max(waiting, default=0)


def _count_states_bytes(job: SearchJob) -> int:
    """Bytes of all hidden states: judged tokens have the source's, and those of every trial."""
    fitted, judged = (ids.numel() for ids in split_sequences(job.calibration.input_ids))
    num_trials = sum(len(unit.trials) for unit in job.choices)
    num_tokens = fitted + judged * (1 + num_trials)
    return memory_estimate.NUMBER_BYTES * job.plan.hidden_size * num_tokens
