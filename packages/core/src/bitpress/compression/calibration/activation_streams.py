"""The hidden states of all calibration batches on their way through the blocks: as the compressed
model makes them, and those of some batches as the source does too.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from attrs import field, frozen
from torch import Tensor, nn

from bitpress.compression.calibration.resumable_forward import (
    ForwardTrace,
    ResumableForward,
    Stop,
    trace_forward,
)
from bitpress.modeling import metrics
from bitpress.modeling.capture import BlockCall
from bitpress.modeling.experts import compute_together
from bitpress.modeling.hidden_states import HiddenStates
from bitpress.runtime.lanes import Lanes
from bitpress.runtime.process_group import SINGLE_PROCESS, ProcessGroup


@frozen(eq=False)
class GroupInputs:
    """The inputs of a layer group, of some tokens.

    Attributes:
        inputs: (tokens, in) as the compressed layers before it make them.
        reference: (tokens, in) as the source makes them; None where the source is not run.
        residual: (tokens, channels) the source's residual stream less the compressed model's,
            before the group's output is added to it.
    """

    inputs: Tensor
    reference: Tensor | None = None
    residual: Tensor | None = None

    @classmethod
    def concatenate(cls, parts: Sequence[GroupInputs]) -> GroupInputs:
        """Those of all tokens of several, which have the same of the three tensors."""
        if len(parts) == 1:
            return parts[0]
        references = [part.reference for part in parts if part.reference is not None]
        residuals = [part.residual for part in parts if part.residual is not None]
        return cls(
            torch.cat([part.inputs for part in parts]),
            torch.cat(references) if parts[0].reference is not None else None,
            torch.cat(residuals) if parts[0].residual is not None else None,
        )

    def select(self, mask: Tensor) -> GroupInputs:
        """Those of the tokens for which the mask (tokens,) is true."""
        return GroupInputs(
            self.inputs[mask],
            None if self.reference is None else self.reference[mask],
            None if self.residual is None else self.residual[mask],
        )


@frozen(eq=False)
class ReferenceStates:
    """Hidden states as the source's blocks make them.

    Attributes:
        states: one for each of the batches.
        batches: the numbers of these among all batches of this rank.
    """

    states: HiddenStates
    batches: Sequence[int]


@frozen
class StreamLimits:
    """How much a block's forward passes and solutions may take for speed.

    Attributes:
        lanes: forward passes run side by side in these.
        max_resumable: forward passes that may stop inside a block; others start anew for every
            layer group.
        max_working_bytes: memory that may be held beyond what the interpreter and its libraries
            take; 0 returns freed memory to the system always.
        num_experts: experts that compute, and whose layers are solved, side by side.
    """

    max_resumable: int
    max_working_bytes: int = 0
    lanes: Lanes = field(factory=Lanes)
    num_experts: int = 1


class ActivationStreams:
    """The hidden states before a block, and the forward passes through it.

    Args:
        states: hidden states of every batch, as the compressed blocks make them.
        reference: hidden states of some batches as the source's blocks make them; None where no
            scheme asks for them.
        process_group: whose ranks share all batches; these are one of theirs.
    """

    def __init__(
        self,
        states: HiddenStates,
        device: torch.device,
        limits: StreamLimits,
        reference: ReferenceStates | None = None,
        process_group: ProcessGroup = SINGLE_PROCESS,
    ) -> None:
        self.states, self.reference = states, reference
        self.device, self.limits, self.process_group = device, limits, process_group
        self._forwards: list[ResumableForward] = []
        # batches in the order in which they are run, which is that of the lanes too
        self._order: list[int] = []
        # by the number of the batch
        self._source_forwards: dict[int, ResumableForward] = {}
        self._traces: dict[tuple[object, ...], ForwardTrace] = {}
        # of all batches, once they have run to the end of the block
        self._distances: list[tuple[float, float]] | None = None

    def enter_block(
        self, block: nn.Module, source_block: nn.Module | None, calls: Sequence[BlockCall]
    ) -> None:
        """Stand before a block.

        Args:
            source_block: the same block, which keeps the source's weights.
            calls: what the block is called with, batch by batch.
        """
        self.block, self.source_block, self.calls = block, source_block, calls
        for entered in filter(None, (block, source_block)):
            compute_together(entered, self.limits.num_experts)
        reference = self.reference
        reference_batches = () if reference is None else reference.batches
        batches = range(len(calls))
        self._order = sorted(batches, key=lambda batch: batch not in reference_batches)
        following = dict(itertools.pairwise(self._order))
        self._forwards = [
            self.start_forward(i, following.get(i), tracks_residual=i in reference_batches)
            for i in batches
        ]
        self._source_forwards = {}
        if source_block is not None and reference is not None:
            for position, i in enumerate(reference.batches):
                self._source_forwards[i] = ResumableForward(
                    source_block,
                    calls[i],
                    self._state_reader(reference.states, position, position + 1),
                    tracks_residual=True,
                )

    def start_forward(
        self, batch: int, following: int | None, tracks_residual: bool = False
    ) -> ResumableForward:
        """A new forward pass of a batch through the block.

        Args:
            following: the batch whose forward pass starts next.
        """
        read_states = self._state_reader(self.states, batch, following)
        return ResumableForward(
            self.block, self.calls[batch], read_states, tracks_residual, batch=batch
        )

    def first_batch(self) -> tuple[BlockCall, Tensor]:
        """The first batch's call of the block and its hidden states."""
        return self.calls[0], self.states[0].to(self.device)

    def trace_forward(self, layers: Sequence[str]) -> ForwardTrace:
        """How rank 0's first batch goes through the block.

        Blocks that are built alike are traced once, unless a router has left layers out.
        """
        kind = (type(self.block), *layers)
        if kind in self._traces:
            return self._traces[kind]
        with self.process_group.agreeing():
            trace = trace_forward(self.block, layers, *self.first_batch())
        trace = self.process_group.broadcast_object(trace)
        if len(trace.called_layers) == len(layers):
            self._traces[kind] = trace
        return trace

    def group_inputs(self, breakpoint_number: int, needs_residual: bool) -> Iterator[GroupInputs]:
        """The inputs of a layer group, batch by batch; those come first of which the source is run
        too.

        Args:
            breakpoint_number: at which forward passes come to the group.
            needs_residual: whether the group's output is added to the residual stream.
        """

        def advance(batch: int) -> list[GroupInputs]:
            return self._advance(batch, breakpoint_number, needs_residual)

        for parts in self.limits.lanes.map(advance, self._order):
            # nothing here holds a part while the next one is made
            while parts:
                yield parts.pop(0)
            del parts

    def _is_resumed(self, batch: int) -> bool:
        """Whether a batch's forward passes may wait inside the block: those of the first
        batches.
        """
        position = self._order.index(batch)
        num_before = position + 1 + min(position + 1, len(self._source_forwards))
        return num_before <= self.limits.max_resumable

    def _advance(
        self, batch: int, breakpoint_number: int, needs_residual: bool
    ) -> list[GroupInputs]:
        """A layer group's inputs of one batch, apart of tokens that are compared with the source's
        and of others; none where its forward pass does not come to it.
        """
        is_resumed = self._is_resumed(batch)
        source_forward = self._source_forwards.get(batch)
        stop = self._forwards[batch].advance(breakpoint_number, is_resumed)
        source_stop = None
        if source_forward is not None:
            source_stop = source_forward.advance(breakpoint_number, is_resumed)
        if stop is None:
            return []
        if source_stop is None:
            return [GroupInputs(stop.inputs)]
        if stop.routed_tokens is not None and source_stop.routed_tokens is not None:
            return _compare_routed(stop, source_stop)

        # where a router stands before the group, the source's sends it other tokens
        if source_stop.inputs.shape != stop.inputs.shape:
            return [GroupInputs(stop.inputs)]
        residual = None
        own_stream, source_stream = stop.residual_stream, source_stop.residual_stream
        if needs_residual and source_stream is not None and own_stream is not None:
            residual = source_stream - own_stream
        return [GroupInputs(stop.inputs, source_stop.inputs, residual)]

    def finish_block(self, is_last: bool = False) -> None:
        """Go on to the block's outputs, if that has not been done.

        Args:
            is_last: no block follows: only outputs that the source makes too are needed.
        """
        if self._distances is not None:
            return

        def finish(batch: int) -> tuple[float, float]:
            return self._finish(batch, is_needed=not is_last or batch in self._source_forwards)

        with self.process_group.agreeing():
            self._distances = list(self.limits.lanes.map(finish, self._order))

    def leave_block(self, is_last: bool = False) -> float | None:
        """Go on to the block's outputs, and let go of the block.

        Args:
            is_last: as for `finish_block`.

        Returns:
            The drift of the outputs that the source makes too, of all ranks: ||h - h'|| / ||h'||,
            h' being the source's; None where the source is not run.
        """
        self.finish_block(is_last)
        distances, self._distances = self._distances or [], None
        own_sums = tuple(sum(numbers) for numbers in zip(*distances, strict=True))
        by_rank = self.process_group.all_gather_object(own_sums)
        squared_error, squared_norm = (sum(sums) for sums in zip(*by_rank, strict=True))

        # a block may take gigabytes: nothing here holds it any longer
        self._forwards, self._source_forwards = [], {}
        del self.block, self.source_block, self.calls
        return metrics.relative_error(squared_error, squared_norm) if squared_norm else None

    def _finish(self, batch: int, is_needed: bool) -> tuple[float, float]:
        """Put a batch's outputs into the place of its inputs, unless they are not needed; returns
        ||h - h'||² and ||h'||², zeros where the source is not run.
        """
        if not is_needed:
            self._forwards[batch].abandon()
            return 0.0, 0.0
        states = self._forwards[batch].finish()
        self.states[batch] = states
        source_forward = self._source_forwards.get(batch)
        if source_forward is None or self.reference is None:
            return 0.0, 0.0
        source_states = source_forward.finish()
        position = self.reference.batches.index(batch)
        self.reference.states[position] = source_states
        return metrics.squared_distance(states, source_states)

    def _state_reader(
        self, states: HiddenStates, position: int, following: int | None
    ) -> Callable[[], Tensor]:
        return lambda: states.bring(position, self.device, following)


def _compare_routed(stop: Stop, source_stop: Stop) -> list[GroupInputs]:
    """An expert's inputs: of the tokens that the source's router sends to it too, and of others."""
    own, source = stop.routed_tokens, source_stop.routed_tokens
    assert own is not None
    assert source is not None
    is_shared = torch.isin(own, source)  # (tokens,)
    # both ascend: shared tokens are in one order
    shared = GroupInputs(stop.inputs[is_shared], source_stop.inputs[torch.isin(source, own)])
    others = GroupInputs(stop.inputs[~is_shared])
    return [part for part in (shared, others) if len(part.inputs)]
