"""Factors for the columns of a layer group, their inverse folded into what produces its input.

This is SmoothQuant's and AWQ's per-channel scaling: diag(s) W and x diag(1/s). Factors are rounded
to eighths of octaves, for which the manifest has short exact numbers, and products to the dtype of
the source, in which norms are stored: the block computes the same function but for these roundings.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from attrs import frozen
from torch import Tensor, nn

from bitpress.checkpoint import layer_names
from bitpress.compression.calibration.activation_streams import ActivationStreams, GroupInputs
from bitpress.compression.calibration.layer_groups import BlockPlan, LayerGroup
from bitpress.compression.calibration.resumable_forward import Breakpoints
from bitpress.compression.calibration.statistics import (
    GroupStatistics,
    move_statistics,
    observe_inputs,
    reduce_statistics,
)
from bitpress.output.rescaling import Rescaled, rescale
from bitpress.runtime.lanes import Lanes
from bitpress.schemes import pipeline

# Factors are kept between its inverse and it: 2**-14 is the smallest normal number of float16.
MAX_FACTOR = 2.0**14

# Factors from a number to its double. With 8 bits for weights and inputs, a model of 11 million
# weights lost 2 % more with 4 of them, and no less with 16.
STEPS_PER_OCTAVE = 8

# Part of a block's output by which a fold of powers of two may move it, through roundings alone:
# one that moves it further has changed the function.
MAX_OUTPUT_CHANGE = 1e-2


@frozen
class Producer:
    """What makes the input of a layer group.

    Attributes:
        module: a norm, or a linear layer whose rows are the input's channels.
        shared_heads: for values that several query heads share, how many consecutive channels make
            a head and how many heads share it.
    """

    module: str
    shared_heads: tuple[int, int] | None = None


@frozen
class Rescaling:
    """What a fold does to a tensor of the block.

    Attributes:
        tensor: its name within the block.
        axis: "columns" or "rows", which are multiplied.
        exponents: of two, one for each.
    """

    tensor: str
    axis: str
    exponents: Sequence[float]


@frozen
class FoldResult:
    """What folding has done to a block.

    Attributes:
        rescaled: by tensor, the exponents of two by which its "columns" and "rows" were multiplied.
        warnings: of groups whose factors could not be folded, one line each.
    """

    rescaled: Mapping[str, Rescaled]
    warnings: Sequence[str]


def find_producer(
    members: Sequence[str], shapes: Mapping[str, tuple[int, ...]], head_dim: int | None
) -> Producer | None:
    """What makes the input of a layer group, by the names that decoders give their layers; None
    where it is not known.

    Args:
        members: names of the group's layers, relative to their block.
        shapes: of every tensor of the block, by the same names.
        head_dim: channels of an attention head.
    """
    parent, _, leaf = members[0].rpartition(".")
    width = shapes[f"{members[0]}.weight"][1]
    siblings = f"{parent}." if parent else ""
    if leaf in ("q_proj", "qkv_proj", "query_key_value"):
        name = "input_layernorm"
    elif leaf in ("gate_proj", "gate_up_proj", "up_proj", "dense_h_to_4h", "w1", "w3"):
        # then the norm feeds a router and every expert
        if any(".experts." in name for name in shapes):
            return None
        name = "post_attention_layernorm"
        if "pre_feedforward_layernorm.weight" in shapes:
            name = "pre_feedforward_layernorm"
    elif leaf in ("down_proj", "w2"):
        # of a gated MLP, down(act(gate(x)) * up(x)): linear in what up makes
        name = f"{siblings}{'up_proj' if leaf == 'down_proj' else 'w3'}"
    elif leaf == "o_proj" and head_dim:
        num_rows = shapes.get(f"{siblings}v_proj.weight", (0,))[0]
        if not num_rows or width % num_rows or num_rows % head_dim:
            return None
        shared_heads = None if num_rows == width else (head_dim, width // num_rows)
        return Producer(f"{siblings}v_proj", shared_heads)
    else:
        return None
    return Producer(name) if shapes.get(f"{name}.weight", (0,))[0] == width else None


def round_to_exponents(factors: Tensor, shared_heads: tuple[int, int] | None) -> list[float]:
    """The exponents of two (in,) of the factors that are folded: eighths, the same for all channels
    that come from the same row of the producer.

    Args:
        factors: (in,).
        shared_heads: as a `Producer` has them; such channels get their geometric mean.
    """
    exponents = factors.float().clamp(1 / MAX_FACTOR, MAX_FACTOR).log2()
    if shared_heads is not None:
        size, sharing = shared_heads
        exponents = exponents.view(-1, sharing, size)  # (heads of v_proj, query heads, head_dim)
        exponents = exponents.mean(1, keepdim=True).expand_as(exponents).reshape(-1)
    steps = exponents.mul(STEPS_PER_OCTAVE).round().int()
    return [step / STEPS_PER_OCTAVE for step in steps.tolist()]


def plan_fold(
    block: nn.Module, members: Sequence[str], producer: Producer, exponents: Sequence[float]
) -> list[Rescaling]:
    """What is to be done to the columns of a group's layers and to what the producer makes.

    Args:
        members: names of the group's layers within the block.
        exponents: (in,) of two, as `round_to_exponents` gives them.
    """
    rescalings = [Rescaling(f"{name}.weight", "columns", exponents) for name in members]
    size, sharing = producer.shared_heads or (1, 1)
    # not -0.0, which JSON would keep
    row_exponents = [0 - e for i, e in enumerate(exponents) if i // size % sharing == 0]
    parameters = block.get_submodule(producer.module).named_parameters(recurse=False)
    return rescalings + [
        Rescaling(f"{producer.module}.{leaf}", "rows", row_exponents) for leaf, _ in parameters
    ]


def read_rescalings(rescaled: Mapping[str, Rescaled], prefix: str) -> list[Rescaling]:
    """What was done to a block's tensors, as a `FoldResult` keeps it.

    Args:
        prefix: what the names of the block's tensors begin with.
    """
    return [
        Rescaling(name.removeprefix(prefix), axis, exponents)
        for name, axes in rescaled.items()
        for axis, exponents in axes.items()
    ]


def fold_into(
    block: nn.Module,
    rescalings: Sequence[Rescaling],
    dtype_of: Callable[[str], torch.dtype] | None = None,
) -> None:
    """Rescale tensors of a block in place.

    Args:
        dtype_of: gives the dtype to whose numbers those of a tensor are rounded; None: its own.
    """
    for rescaling in rescalings:
        parameter = block.get_parameter(rescaling.tensor)
        dtype = parameter.dtype if dtype_of is None else dtype_of(rescaling.tensor)
        parameter.copy_(rescale(parameter.to(dtype), {rescaling.axis: rescaling.exponents}))


def fold_scales(
    groups: Sequence[LayerGroup], block_plan: BlockPlan, streams: ActivationStreams
) -> FoldResult:
    """Fold the factors that schemes choose into the block, one pass of all batches through its
    float weights deciding them.
    """
    rescaled_groups = [
        group
        for group in groups
        if group.first_layer and any(step.rescales for step in group.stack.steps)
    ]
    producers = _find_producers(rescaled_groups, block_plan, streams.block)
    foldable = [group for group in rescaled_groups if group.stack.name in producers]
    without_producer = [
        group.stack.name for group in rescaled_groups if group.stack.name not in producers
    ]
    with streams.process_group.agreeing():
        statistics = _observe_groups(foldable, streams) if foldable else []
    rescaled: dict[str, dict[str, Sequence[float]]] = {}
    warnings = []
    for group, group_statistics in zip(foldable, statistics, strict=True):
        members = [name.removeprefix(block_plan.prefix) for name in group.modules]
        producer = producers[group.stack.name]
        exponents = _choose_exponents(group, group_statistics, producer, streams)
        if not any(exponents):
            continue
        if not _is_sole_consumer(members, producer, streams):
            warnings.append(
                f"{group.stack.name}: {producer.module} feeds more than this; its inputs are not "
                "rescaled"
            )
            continue

        rescalings = plan_fold(streams.block, members, producer, exponents)
        fold_into(streams.block, rescalings, block_plan.source_dtype)
        if streams.source_block is not None:
            fold_into(streams.source_block, rescalings)
        for rescaling in rescalings:
            axes = rescaled.setdefault(block_plan.prefix + rescaling.tensor, {})
            axes[rescaling.axis] = rescaling.exponents
    return FoldResult(rescaled, [*warnings, *_warn_of_missing_producers(without_producer)])


def _find_producers(
    groups: Sequence[LayerGroup], block_plan: BlockPlan, block: nn.Module
) -> dict[str, Producer]:
    """By stack, what makes its input; those are missing of which it is not known, and where codes
    are kept, which can take no factors.
    """
    kept = {module for stack in block_plan.stacks if stack.keeps_codes for module in stack.members}
    shapes = {
        name: tuple(parameter.shape)
        for name, parameter in block.named_parameters(remove_duplicate=False)
    }
    producers = {}
    for group in groups:
        members = [name.removeprefix(block_plan.prefix) for name in group.modules]
        producer = find_producer(members, shapes, block_plan.head_dim)
        if producer is not None and block_plan.prefix + producer.module not in kept:
            producers[group.stack.name] = producer
    return producers


def _observe_groups(
    groups: Sequence[LayerGroup], streams: ActivationStreams
) -> list[GroupStatistics]:
    """The statistics of several groups over this rank's batches, in one forward pass of each."""
    breakpoints = Breakpoints(streams.block, [str(group.first_layer) for group in groups])
    merged = [GroupStatistics.of_no_token(group) for group in groups]

    def observe(batch: int) -> list[GroupStatistics]:
        forward, observed = streams.start_forward(batch, batch + 1), []
        for number, group in enumerate(groups):
            # after the last group it is abandoned
            stop = forward.advance(number, is_resumed=number + 1 < len(groups))
            batches = [] if stop is None else [GroupInputs(stop.inputs)]
            by_step = observe_inputs(group, batches, Lanes()).by_step
            # those of all groups are there at once
            home = group.weights_device
            observed.append(GroupStatistics([move_statistics(step, home) for step in by_step]))
        return observed

    for observed in streams.limits.lanes.map(observe, range(len(streams.calls))):
        for of_group, of_batch in zip(merged, observed, strict=True):
            steps = zip(of_group.by_step, of_batch.by_step, strict=True)
            for step_statistics, batch_statistics in steps:
                pipeline.merge(step_statistics, batch_statistics)
    breakpoints.remove()
    return merged


def _choose_exponents(
    group: LayerGroup,
    statistics: GroupStatistics,
    producer: Producer,
    streams: ActivationStreams,
) -> list[float]:
    """The exponents (in,) of the factors that the group's schemes choose on rank 0, for all ranks;
    none where they choose none.
    """
    process_group, device = streams.process_group, streams.device
    own_statistics = [move_statistics(step, device) for step in statistics.by_step]
    by_step = reduce_statistics(process_group, own_statistics, 0, device)
    exponents: list[float] = []
    if process_group.is_rank_zero:
        factors = pipeline.rescale(group.layer, group.stack.steps, by_step)
        if factors is not None:
            exponents = round_to_exponents(factors, producer.shared_heads)
    # not the factors: a tensor would come to every rank on this one's GPU
    return process_group.broadcast_object(exponents)


def _is_sole_consumer(
    members: Sequence[str], producer: Producer, streams: ActivationStreams
) -> bool:
    """Whether the block computes the same once powers of two are folded, which no multiplication
    rounds; the block is left as it was. It does not where the producer feeds other layers too.
    """
    block = streams.block
    width = block.get_parameter(f"{members[0]}.weight").shape[1]
    # all but a few channels differ from those that could be taken for them
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-1, 2, (width,), generator=generator).float().exp2()
    exponents = round_to_exponents(factors, producer.shared_heads)
    rescalings = plan_fold(block, members, producer, exponents)

    with streams.process_group.agreeing():
        call, hidden_states = streams.first_batch()
        before = call(block, hidden_states)
        # multiplying back would not restore the smallest numbers of float16
        kept = {r.tensor: block.get_parameter(r.tensor).clone() for r in rescalings}
        fold_into(block, rescalings)
        change = (call(block, hidden_states) - before).norm()
        is_unchanged = bool(change <= MAX_OUTPUT_CHANGE * before.norm())
        for name, tensor in kept.items():
            block.get_parameter(name).copy_(tensor)
    return streams.process_group.broadcast_object(is_unchanged)


def _warn_of_missing_producers(names: Sequence[str]) -> Iterator[str]:
    """A line for groups of which it is not known what makes their input, alike ones together."""
    # experts follow one another
    for _, alike in itertools.groupby(names, lambda name: layer_names.INDEX_PART.sub("*", name)):
        first, *others = alike
        like_it = f" and {len(others)} like it" if others else ""
        yield (
            f"{first}{like_it}: nothing is known that could take a rescaling of its inputs; not "
            "rescaled"
        )
