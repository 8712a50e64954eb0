"""What falls to one rank of a calibrated run: its batches, and the memory that it may take."""

from __future__ import annotations

from collections.abc import Sequence

from attrs import frozen
from torch import Tensor

from bitpress.compression.resources import Resources
from bitpress.planning import memory_estimate
from bitpress.planning.plan import Plan
from bitpress.runtime import memory
from bitpress.runtime.process_group import ProcessGroup


@frozen(eq=False)
class OwnBatches:
    """The part of the calibration batches that is this rank's.

    Attributes:
        batches: token ids, (sequences, length) int64 each.
        numbers: of these among those of all ranks.
        reference_interval: every how many batches of all ranks the source is run too.
    """

    batches: Sequence[Tensor]
    numbers: Sequence[int]
    reference_interval: int

    @classmethod
    def of_rank(cls, plan: Plan, input_ids: Tensor, process_group: ProcessGroup) -> OwnBatches:
        """The part of `input_ids` (sequences, length) that falls to a rank."""
        batches = memory_estimate.split_batches(input_ids, process_group.world_size)
        numbers = process_group.partition_evenly(batches)
        interval = memory_estimate.reference_interval(plan, input_ids.numel())
        return cls([batches[i] for i in numbers], numbers, interval)


@frozen
class Budget:
    """How a run keeps to the memory that it may take.

    Attributes:
        max_working_bytes: that it plans to hold beyond the interpreter and its libraries.
        is_ample: whether what is freed may stay in the heap, which is faster.
        is_spilled: whether hidden states are kept on disk.
        num_lanes: forward passes that run side by side.
        max_resumable: forward passes that may wait inside a block.
    """

    max_working_bytes: int
    is_ample: bool
    is_spilled: bool
    num_lanes: int
    max_resumable: int

    @classmethod
    def for_run(cls, plan: Plan, own_batches: OwnBatches, resources: Resources) -> Budget:
        """The budget of this rank."""
        num_sequences, length = own_batches.batches[0].shape
        num_tokens = sum(batch.numel() for batch in own_batches.batches)
        estimate = memory_estimate.estimate_calibration(plan, num_tokens, length)
        if resources.max_memory is None:
            available_bytes = memory.available_bytes() // resources.process_group.local_world_size
        else:
            available_bytes = resources.max_memory - memory.TRANSFORMERS_BYTES

        # Holes in a heap that keeps what is freed take as much again as a run holds. Without a
        # limit, half is left to others in any case.
        is_ample = available_bytes >= 2 * estimate.in_memory
        uses_half = is_ample or resources.max_memory is None
        max_working_bytes = available_bytes // 2 if uses_half else available_bytes
        num_lanes = 1
        if resources.device.type == "cpu":
            num_lanes = estimate.num_lanes(max_working_bytes, resources.num_threads)
        waiting_bytes = max_working_bytes - (num_lanes - 1) * estimate.per_lane
        return cls(
            max_working_bytes,
            is_ample,
            bool(estimate.spilled_bytes(max_working_bytes)),
            num_lanes,
            estimate.num_waiting(waiting_bytes, num_sequences * length),
        )
