"""The batches on which gradients of the source's outputs are observed, and when that is done."""

from __future__ import annotations

from collections.abc import Sequence

from bitpress.compression.calibration.activation_streams import ActivationStreams, ReferenceStates
from bitpress.compression.calibration.layer_groups import GradientsByStack
from bitpress.compression.calibration.output_gradients import (
    GradientSource,
    GradientStatistics,
    SampleBatches,
    observe_gradients,
)
from bitpress.compression.calibration.rank_share import OwnBatches
from bitpress.errors import first_line, is_out_of_memory
from bitpress.modeling.capture import CapturedInputs
from bitpress.modeling.decoder import Decoder
from bitpress.planning import memory_estimate
from bitpress.planning.layout import Stack
from bitpress.planning.plan import Plan
from bitpress.runtime.progress import ReportProgress


class GradientSample:
    """What is observed of gradients: taken when the first block is compressed that no earlier run
    has finished, of that block and all after it.
    """

    def __init__(
        self,
        plan: Plan,
        decoder: Decoder,
        own_batches: OwnBatches,
        inputs: CapturedInputs,
        streams: ActivationStreams,
    ) -> None:
        self._plan, self._decoder, self._own_batches = plan, decoder, own_batches
        self._inputs, self._streams = inputs, streams
        self._statistics: GradientStatistics | None = None
        self.warnings: list[str] = []

    def of_block(
        self, index: int, stacks: Sequence[Stack], report_progress: ReportProgress
    ) -> GradientsByStack:
        """By stack, the statistics of every step; empty where none takes any."""
        if self._streams.reference is None or not self._plan.needs_gradients:
            return {}
        if self._statistics is None:
            report_progress(0, "running the source backward")
            try:
                self._statistics = self._observe(index, self._streams.reference)
            except (RuntimeError, NotImplementedError) as e:
                if is_out_of_memory(e):
                    raise
                self._statistics = GradientStatistics()
                self.warnings.append(
                    f"the model cannot be run backward ({first_line(e)}): rows do not make up for "
                    "each other's errors"
                )
        return {stack.name: self._statistics.of_stack(stack.name) for stack in stacks}

    def _observe(self, first_block: int, reference: ReferenceStates) -> GradientStatistics:
        plan, own = self._plan, self._own_batches
        interval = own.reference_interval
        batch_tokens = own.batches[0].numel()
        positions = [
            i
            for i, batch in enumerate(reference.batches)
            if memory_estimate.is_gradient_batch(plan, own.numbers[batch], interval, batch_tokens)
        ]
        batches = [reference.batches[i] for i in positions]
        sample = SampleBatches(
            reference.states.kept_alike(reference.states[i] for i in positions),
            [[calls[batch] for batch in batches] if calls else [] for calls in self._inputs.calls],
            [own.numbers[batch] for batch in batches],
        )
        stacks = {shard.block: shard.stacks for shard in plan.shards if shard.block is not None}
        source = GradientSource(self._decoder, stacks, plan.container, self._streams.limits.lanes)
        return observe_gradients(source, sample, first_block)
