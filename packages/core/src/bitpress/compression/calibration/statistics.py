"""What the steps of a layer group observe of its inputs, over all batches and all ranks."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal

import torch
from attrs import evolve, frozen
from torch import Tensor

from bitpress.checkpoint.layer_names import OF_EXPERT
from bitpress.compression.calibration.activation_streams import ActivationStreams, GroupInputs
from bitpress.compression.calibration.layer_groups import LayerGroup
from bitpress.errors import CheckpointError, SchemeError
from bitpress.planning import memory_estimate
from bitpress.planning.calibration_config import MIN_EXPERT_TOKENS
from bitpress.runtime.lanes import Lanes
from bitpress.runtime.process_group import ProcessGroup
from bitpress.schemes import pipeline
from bitpress.schemes.values import Statistic

# Tokens on which the output error of a layer is measured.
SAMPLE_TOKENS = 256

# Part of a batch's tokens that may be NaN or infinite: these are left out.
MAX_NON_FINITE = 1e-3

# Experts that a warning names.
MAX_NAMED_EXPERTS = 4

# Statistics of one step, by name.
StepStatistics = dict[str, Statistic]


def move_statistics(statistics: Mapping[str, Statistic], device: torch.device) -> StepStatistics:
    """Statistics of one step, in a device's memory."""
    return {
        name: evolve(statistic, value=statistic.value.to(device))
        for name, statistic in statistics.items()
    }


@frozen(eq=False)
class GroupStatistics:
    """What is known of the inputs of a layer group.

    Attributes:
        by_step: the statistics of every step.
        sample: (tokens, in) some of the inputs; None where there are none.
        num_tokens: of the inputs.
    """

    by_step: Sequence[StepStatistics]
    sample: Tensor | None = None
    num_tokens: int = 0

    @classmethod
    def of_no_token(cls, group: LayerGroup) -> GroupStatistics:
        """Those of a group that has been given no input."""
        return cls([{} for _ in group.stack.steps])


def collect_statistics(
    group: LayerGroup, breakpoint_number: int, streams: ActivationStreams, owner: int = 0
) -> GroupStatistics:
    """The statistics of a layer group of the block that the streams stand before, over the batches
    of all ranks.

    Args:
        breakpoint_number: at which forward passes come to the group.
        owner: the rank that gets the statistics of the steps; the other ranks' are empty.
    """
    inputs: Iterable[GroupInputs] = ()
    if group.first_layer is not None:
        inputs = streams.group_inputs(breakpoint_number, group.is_residual)
    return gather_statistics(group, inputs, streams, owner)


def gather_statistics(
    group: LayerGroup, inputs: Iterable[GroupInputs], streams: ActivationStreams, owner: int = 0
) -> GroupStatistics:
    """The statistics of a layer group over the inputs of all ranks.

    Experts that are sent few tokens get none: second moments of so few say little.

    Args:
        inputs: of this rank's batches.
        owner: the rank that gets the statistics of the steps; the other ranks' are empty.
    """
    process_group = streams.process_group
    with process_group.agreeing():
        statistics = observe_inputs(group, inputs, streams.limits.lanes)
        for merged, observed in zip(statistics.by_step, group.gradient_statistics, strict=False):
            pipeline.merge(merged, move_statistics(observed, streams.device))

    by_step = reduce_statistics(process_group, statistics.by_step, owner, streams.device)
    sample = process_group.broadcast_from_last(statistics.sample, streams.device)
    num_tokens = sum(process_group.all_gather_object(statistics.num_tokens))
    if group.is_routed and num_tokens < MIN_EXPERT_TOKENS:
        by_step = GroupStatistics.of_no_token(group).by_step
    return GroupStatistics(by_step, sample, num_tokens)


def observe_inputs(
    group: LayerGroup, batches: Iterable[GroupInputs], lanes: Lanes
) -> GroupStatistics:
    """The statistics of a layer group over the batches of one rank, which are observed side by side
    and added up in their order.
    """
    statistics = GroupStatistics.of_no_token(group)
    if not group.stack.calibrated:
        return statistics
    # a router may send an expert nothing
    batches = (batch for batch in batches if len(batch.inputs))
    observe = functools.partial(_observe_batch, group, group.weight)
    for observed in lanes.map(observe, _join_batches(batches)):
        steps = zip(statistics.by_step, observed.by_step, strict=True)
        for merged, batch_statistics in steps:
            pipeline.merge(merged, batch_statistics)
        num_tokens = statistics.num_tokens + observed.num_tokens
        statistics = evolve(statistics, sample=observed.sample, num_tokens=num_tokens)
        # the next one is made without this one in memory
        del observed, steps, batch_statistics
    return statistics


def _observe_batch(group: LayerGroup, weight: Tensor, batch: GroupInputs) -> GroupStatistics:
    """The statistics of one batch.

    Args:
        weight: (out, in) the group's.
    """
    batch = _drop_non_finite(group.stack.name, batch)
    by_step = [
        dict(pipeline.observe(step, weight, batch.inputs, batch.reference, batch.residual) or {})
        for step in group.stack.steps
    ]
    # a copy: a view would hold all of the batch
    return GroupStatistics(by_step, batch.inputs[:SAMPLE_TOKENS].clone(), len(batch.inputs))


def _join_batches(batches: Iterable[GroupInputs]) -> Iterator[GroupInputs]:
    """Those that are alike joined until there are `STATISTICS_TOKENS`: statistics are large, and
    adding them up costs.
    """
    # of tokens that are compared with the source's, and of others
    compared: list[GroupInputs] = []
    others: list[GroupInputs] = []
    for batch in batches:
        (others if batch.reference is None else compared).append(batch)
        # neither here nor in a list while the next one is made
        del batch
        if _count_tokens(compared) + _count_tokens(others) >= memory_estimate.STATISTICS_TOKENS:
            yield _take_joined(max(compared, others, key=_count_tokens))
    for parts in (compared, others):
        if parts:
            yield _take_joined(parts)


def _count_tokens(parts: Sequence[GroupInputs]) -> int:
    return sum(len(part.inputs) for part in parts)


def _take_joined(parts: list[GroupInputs]) -> GroupInputs:
    """The parts as one; the list is empty afterwards."""
    joined = GroupInputs.concatenate(parts)
    parts.clear()
    return joined


def _drop_non_finite(name: str, batch: GroupInputs) -> GroupInputs:
    """The tokens whose numbers are finite; raises CheckpointError where too many are not."""
    tensors = [
        tensor for tensor in (batch.inputs, batch.reference, batch.residual) if tensor is not None
    ]
    # one cheap pass: a NaN or Inf anywhere makes the sum so
    if all(math.isfinite(tensor.sum()) for tensor in tensors):
        return batch

    mask = torch.stack([tensor.isfinite().all(1) for tensor in tensors]).all(0)  # (tokens,)
    num_non_finite = len(mask) - int(mask.sum())
    if num_non_finite > MAX_NON_FINITE * len(mask):
        raise CheckpointError(
            f"layer {name}: {num_non_finite} of {len(mask)} calibration tokens reach it as NaN or "
            "infinity: the model itself makes them (or its weights are damaged); check that it "
            "runs in this precision"
        )
    return batch.select(mask)


def warn_of_few_tokens(num_tokens: Mapping[str, int]) -> Iterator[str]:
    """A warning for each block's experts of which some are sent few tokens.

    Args:
        num_tokens: by layer of an expert.
    """
    by_experts: dict[str, dict[str, int]] = {}
    for module, count in num_tokens.items():
        if match := OF_EXPERT.fullmatch(module):
            by_experts.setdefault(match["experts"], {})[match["number"]] = count
    for experts, counts in by_experts.items():
        undersampled = {
            number: count for number, count in counts.items() if count < MIN_EXPERT_TOKENS
        }
        if undersampled:
            names = ", ".join(
                f"{number} ({count} tokens)"
                for number, count in list(undersampled.items())[:MAX_NAMED_EXPERTS]
            )
            if len(undersampled) > MAX_NAMED_EXPERTS:
                names += ", ..."
            yield (
                f"{experts}: {len(undersampled)} of {len(counts)} experts were sent fewer than "
                f"{MIN_EXPERT_TOKENS} tokens and are compressed as without data: "
                f"{names}; give more text, or --all-experts"
            )


@frozen
class _StatisticSpec:
    """What the ranks must agree on before they add a statistic up."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    merge: Literal["sum", "max"]
    rows: bool
    # counts may lie on the CPU beside sums on a GPU
    device_type: str

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        rows = ", by rows" if self.rows else ""
        return f"{self.merge} of {dtype} {list(self.shape)} on {self.device_type}{rows}"

    @classmethod
    def of(cls, statistic: Statistic) -> _StatisticSpec:
        value = statistic.value
        return cls(
            tuple(value.shape), value.dtype, statistic.merge, statistic.rows, value.device.type
        )

    def neutral_value(self, device: torch.device) -> Tensor:
        """What changes no sum or maximum."""
        neutral = 0.0 if self.merge == "sum" else -torch.inf
        if self.device_type != device.type:
            device = torch.device(self.device_type)
        return torch.full(self.shape, neutral, dtype=self.dtype, device=device)


def reduce_statistics(
    process_group: ProcessGroup,
    by_step: Sequence[StepStatistics],
    owner: int,
    device: torch.device,
) -> Sequence[StepStatistics]:
    """The statistics of all ranks, merged, for their owner; those of the others are empty.

    A rank whose tokens gave none of a kind takes part with zeros, or with minus infinity.

    Args:
        by_step: of this rank; used up, so that one at a time is there twice.
        owner: the rank that gets them.

    Raises:
        AgreedOutOfMemoryError: on all ranks, where one has no memory for a copy.
    """
    if process_group.world_size == 1:
        return by_step
    reduced = []
    for own_statistics, specs in zip(by_step, _gather_specs(process_group, by_step), strict=True):
        step_statistics: StepStatistics = {}
        for name, spec in specs.items():
            with process_group.agreeing():
                value = _addend(own_statistics.pop(name, None), spec, device)
            process_group.reduce(value.reshape(-1), owner, spec.merge)
            if process_group.rank == owner:
                step_statistics[name] = Statistic(value, spec.merge, spec.rows)
        reduced.append(step_statistics)
    return reduced


def _addend(statistic: Statistic | None, spec: _StatisticSpec, device: torch.device) -> Tensor:
    """What a rank adds to those of the others: its own value, or what changes nothing."""
    if statistic is None:
        return spec.neutral_value(device)
    # two statistics may be one tensor, and it is changed in place
    return statistic.value.clone(memory_format=torch.contiguous_format)


def _gather_specs(
    process_group: ProcessGroup, by_step: Sequence[StepStatistics]
) -> list[dict[str, _StatisticSpec]]:
    """The statistics that any rank has, step by step, in one order for all."""
    own_specs = [
        {name: _StatisticSpec.of(statistic) for name, statistic in step.items()} for step in by_step
    ]
    union: list[dict[str, _StatisticSpec]] = [{} for _ in by_step]
    for of_rank in process_group.all_gather_object(own_specs):
        for specs, step in zip(union, of_rank, strict=True):
            for name, spec in step.items():
                if specs.setdefault(name, spec) != spec:
                    raise SchemeError(
                        f"statistics {name!r} of two ranks are {specs[name]} and {spec}, and "
                        "cannot be added up"
                    )
    return union
