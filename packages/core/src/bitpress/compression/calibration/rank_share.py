"""What falls to one rank of a calibrated run: its batches, and the memory that it may take."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from attrs import evolve, frozen
from torch import Tensor

from bitpress.compression.resources import Resources
from bitpress.errors import is_out_of_memory
from bitpress.planning import memory_estimate, numbers_held
from bitpress.planning.memory_estimate import CalibrationMemory
from bitpress.planning.plan import Plan
from bitpress.runtime import devices, memory
from bitpress.runtime.devices import CPU
from bitpress.runtime.process_group import AgreedOutOfMemoryError, ProcessGroup


@frozen
class Thrift:
    """How sparing a run is with a GPU's memory, which it has run out of before.

    Attributes:
        batch_tokens: that are run through a block together.
        is_minimal: whether only what is needed at least is kept there.
        by_layer: whether blocks are brought there layer by layer, even if they fit.
    """

    batch_tokens: int
    is_minimal: bool = False
    by_layer: bool = False

    def after(
        self, error: RuntimeError, input_ids: Tensor, process_group: ProcessGroup
    ) -> Thrift | None:
        """How a run goes on after an error; None where it cannot: there was memory enough, or no
        step is left, or the other ranks do not know.
        """
        is_known = process_group.world_size == 1 or isinstance(error, AgreedOutOfMemoryError)
        return self.more(input_ids) if is_out_of_memory(error) and is_known else None

    def more(self, input_ids: Tensor) -> Thrift | None:
        """The next step: nothing kept that need not be, then ever smaller batches, then blocks that
        are brought layer by layer; None after the last.

        Args:
            input_ids: of all batches, (sequences, length).
        """
        length, batch_tokens = input_ids.shape[1], min(self.batch_tokens, input_ids.numel())
        if not self.is_minimal:
            return Thrift(batch_tokens, is_minimal=True)
        if batch_tokens > length:
            return evolve(self, batch_tokens=max(batch_tokens // 2, length))
        return None if self.by_layer else evolve(self, by_layer=True)

    def __str__(self) -> str:
        where = ", its weights brought layer by layer" if self.by_layer else ""
        return f"{self.batch_tokens:,} tokens at a time{where}"


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
    def of_rank(
        cls, plan: Plan, input_ids: Tensor, process_group: ProcessGroup, batch_tokens: int
    ) -> OwnBatches:
        """The part of `input_ids` (sequences, length) that falls to a rank, in batches of so many
        tokens.
        """
        batches = memory_estimate.split_batches(input_ids, process_group.world_size, batch_tokens)
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
        num_experts: whose layers all ranks solve side by side, if all have as much memory.
        states_device: in whose memory hidden states are kept that are not on disk.
        max_brought_bytes: as a `DecoderOptions` has it.
    """

    max_working_bytes: int
    is_ample: bool
    is_spilled: bool
    num_lanes: int
    max_resumable: int
    num_experts: int
    states_device: torch.device
    max_brought_bytes: int | None = None

    @classmethod
    def for_run(
        cls, plan: Plan, own_batches: OwnBatches, resources: Resources, thrift: Thrift
    ) -> Budget:
        """The budget of this rank."""
        num_sequences, length = own_batches.batches[0].shape
        num_tokens = sum(batch.numel() for batch in own_batches.batches)
        if resources.max_memory is None:
            available_bytes = memory.available_bytes() // resources.process_group.local_world_size
        else:
            available_bytes = resources.max_memory - memory.TRANSFORMERS_BYTES
        if resources.device.type != "cpu":
            host_bytes = available_bytes // 2
            return cls._on_gpu(plan, own_batches, host_bytes, resources, thrift)
        estimate = memory_estimate.estimate_calibration(plan, num_tokens, length)

        # Holes in a heap that keeps what is freed take as much again as a run holds. Half is left
        # for them only if forward passes can wait in the other half: running these again would take
        # longer. Without a limit, half is left to others in any case.
        waiting_bytes = _waiting_bytes(plan, estimate, num_tokens)
        is_ample = available_bytes >= 2 * (estimate.in_memory + waiting_bytes)
        uses_half = is_ample or resources.max_memory is None
        max_working_bytes = available_bytes // 2 if uses_half else available_bytes
        num_lanes = estimate.num_lanes(max_working_bytes, resources.num_threads)
        free_bytes = max_working_bytes - (num_lanes - 1) * estimate.per_lane - estimate.in_memory
        max_experts = min(num_lanes * plan.experts_per_batch, plan.max_experts_together)
        own_experts = estimate.num_experts(free_bytes - waiting_bytes, max_experts)
        free_bytes -= (own_experts - 1) * estimate.per_expert
        return cls(
            max_working_bytes,
            is_ample,
            bool(estimate.spilled_bytes(max_working_bytes)),
            num_lanes,
            estimate.num_waiting(free_bytes, num_sequences * length),
            min(own_experts * resources.process_group.world_size, plan.max_experts_together),
            CPU,
        )

    @classmethod
    def _on_gpu(
        cls,
        plan: Plan,
        own_batches: OwnBatches,
        host_bytes: int,
        resources: Resources,
        thrift: Thrift,
    ) -> Budget:
        """Blocks lie on the GPU, or in the host's memory where they do not fit. Hidden states stay
        on the GPU while there is room for all of them, then in the host's memory, then on disk;
        what is left of the GPU's memory is for forward passes that wait.
        """
        num_sequences, length = own_batches.batches[0].shape
        num_tokens = sum(batch.numel() for batch in own_batches.batches)
        device_bytes = devices.usable_memory(resources.device, resources.max_device_memory)
        estimate = memory_estimate.estimate_device(plan, num_tokens, length)
        states_bytes, max_brought_bytes = host_bytes, None
        if thrift.by_layer or estimate.on_disk > device_bytes:
            estimate = memory_estimate.estimate_device(plan, num_tokens, length, by_layer=True)
            states_bytes -= memory_estimate.host_block_bytes(plan)
            max_brought_bytes = memory_estimate.brought_bytes(plan)
        if thrift.is_minimal:
            device_bytes = 0
        moved_bytes = estimate.spilled_bytes(device_bytes)
        free_bytes = device_bytes - (estimate.in_memory - moved_bytes)
        waiting_bytes = _waiting_bytes(plan, estimate, num_tokens)
        own_experts = estimate.num_experts(free_bytes - waiting_bytes, plan.max_experts_together)
        free_bytes -= (own_experts - 1) * estimate.per_expert
        world_size = resources.process_group.world_size
        return cls(
            host_bytes,
            is_ample=True,
            is_spilled=moved_bytes > max(states_bytes, 0),
            num_lanes=1,
            max_resumable=estimate.num_waiting(free_bytes, num_sequences * length),
            num_experts=min(own_experts * world_size, plan.max_experts_together),
            states_device=CPU if moved_bytes else resources.device,
            max_brought_bytes=max_brought_bytes,
        )


def _waiting_bytes(plan: Plan, estimate: CalibrationMemory, num_tokens: int) -> int:
    """What forward passes of so many tokens hold, the source's included, if all of them wait."""
    return estimate.per_waiting_token * num_tokens * numbers_held.num_blocks_held(plan)
