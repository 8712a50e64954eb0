"""Factors for the columns of a layer group, their inverse folded into what produces its input.

This is SmoothQuant's and AWQ's per-channel scaling: diag(s) W and x diag(1/s). Factors are rounded
to powers of two, so that no multiplication rounds: the block computes the same function to the bit
wherever multiplication commutes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

from attrs import frozen
from torch import Tensor, nn

from bitpress.checkpoint import layer_names
from bitpress.compression.calibration.activation_streams import ActivationStreams, GroupInputs
from bitpress.compression.calibration.layer_groups import BlockPlan, LayerGroup
from bitpress.compression.calibration.resumable_forward import Breakpoints
from bitpress.compression.calibration.statistics import (
    GroupStatistics,
    observe_inputs,
    reduce_statistics,
)
from bitpress.schemes import pipeline

# Factors are kept between its inverse and it: 2**-14 is the smallest normal number of float16.
MAX_FACTOR = 2.0**14

# Part of a block's output by which a fold may move it, through roundings alone: one that moves it
# further has changed the function, and is undone.
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


@frozen(eq=False)
class Rescaling:
    """A tensor of the block whose columns or rows were multiplied by powers of two.

    Attributes:
        axis: "columns" or "rows".
        exponents: of two, one for each.
    """

    tensor: str
    axis: str
    exponents: list[int]


@frozen
class FoldResult:
    """What folding has done to a block.

    Attributes:
        rescaled: by tensor, the exponents of two by which its "columns" and "rows" were multiplied.
        warnings: of groups whose factors could not be folded, one line each.
    """

    rescaled: Mapping[str, Mapping[str, Sequence[int]]]
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


def round_to_powers_of_two(factors: Tensor, shared_heads: tuple[int, int] | None) -> Tensor:
    """The nearest powers of two (in,), one for all channels that come from the same row of the
    producer.

    Args:
        factors: (in,).
        shared_heads: as a `Producer` has them; such channels get their geometric mean.
    """
    exponents = factors.float().clamp(1 / MAX_FACTOR, MAX_FACTOR).log2()
    if shared_heads is not None:
        size, sharing = shared_heads
        exponents = exponents.view(-1, sharing, size)  # (heads of v_proj, query heads, head_dim)
        exponents = exponents.mean(1, keepdim=True).expand_as(exponents).reshape(-1)
    return exponents.round().exp2()


def fold_factors(
    block: nn.Module, members: Sequence[str], producer: Producer, factors: Tensor
) -> list[Rescaling]:
    """Multiply the columns of a group's layers and divide what the producer makes, in place.

    Args:
        members: names of the group's layers within the block.
        factors: (in,) powers of two.
    """
    exponents = [int(exponent) for exponent in factors.log2().tolist()]
    for name in members:
        block.get_parameter(f"{name}.weight").mul_(factors)
    rescalings = [Rescaling(f"{name}.weight", "columns", exponents) for name in members]

    row_factors = factors
    if producer.shared_heads is not None:
        size, sharing = producer.shared_heads
        row_factors = factors.view(-1, sharing, size)[:, 0].reshape(-1)
    row_exponents = [-int(exponent) for exponent in row_factors.log2().tolist()]
    for leaf, parameter in block.get_submodule(producer.module).named_parameters(recurse=False):
        parameter.div_(row_factors if parameter.ndim == 1 else row_factors.unsqueeze(1))
        rescalings.append(Rescaling(f"{producer.module}.{leaf}", "rows", row_exponents))
    return rescalings


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
    if not rescaled_groups:
        return FoldResult({}, [])

    statistics = _observe_groups(rescaled_groups, streams)
    shapes = {
        name: tuple(parameter.shape)
        for name, parameter in streams.block.named_parameters(remove_duplicate=False)
    }
    rescaled: dict[str, dict[str, list[int]]] = {}
    warnings, without_producer = [], []
    for group, group_statistics in zip(rescaled_groups, statistics, strict=True):
        members = [name.removeprefix(block_plan.prefix) for name in group.modules]
        producer = find_producer(members, shapes, block_plan.head_dim)
        factors = _choose_factors(group, group_statistics, producer, streams)
        if producer is None:
            without_producer.append(group.stack.name)
        elif factors is not None:
            factors = round_to_powers_of_two(factors, producer.shared_heads)
            rescalings = _try_fold(members, producer, factors, streams)
            if rescalings is None:
                warnings.append(
                    f"{group.stack.name}: {producer.module} feeds more than this; its inputs are "
                    "not rescaled"
                )
            for rescaling in rescalings or ():
                axes = rescaled.setdefault(block_plan.prefix + rescaling.tensor, {})
                axes[rescaling.axis] = rescaling.exponents
    return FoldResult(rescaled, [*warnings, *_warn_of_missing_producers(without_producer)])


def _observe_groups(
    groups: Sequence[LayerGroup], streams: ActivationStreams
) -> list[GroupStatistics]:
    """The statistics of several groups over this rank's batches, in one forward pass of each."""
    breakpoints = Breakpoints(streams.block, [str(group.first_layer) for group in groups])
    merged = [GroupStatistics.of_no_token(group) for group in groups]
    for batch in range(len(streams.calls)):
        forward = streams.start_forward(batch)
        for number, group in enumerate(groups):
            # after the last group it is abandoned
            inputs, _ = forward.advance(number, is_resumed=number + 1 < len(groups))
            observed = observe_inputs(group, [] if inputs is None else [GroupInputs(inputs)])
            steps = zip(merged[number].by_step, observed.by_step, strict=True)
            for step_statistics, batch_statistics in steps:
                pipeline.merge(step_statistics, batch_statistics)
    breakpoints.remove()
    return merged


def _choose_factors(
    group: LayerGroup,
    statistics: GroupStatistics,
    producer: Producer | None,
    streams: ActivationStreams,
) -> Tensor | None:
    """The factors (in,) that the group's schemes choose on rank 0, for all ranks; None for none.

    Every rank takes part in the collectives for every group, whether it has a producer or not.
    """
    process_group = streams.process_group
    by_step = reduce_statistics(process_group, statistics.by_step, 0, streams.device)
    factors = None
    if producer is not None and process_group.is_rank_zero:
        factors = pipeline.rescale(group.layer, group.stack.steps, by_step)
    return process_group.broadcast_object(factors)


def _try_fold(
    members: Sequence[str], producer: Producer, factors: Tensor, streams: ActivationStreams
) -> list[Rescaling] | None:
    """Fold into the block and its source alike; None, and undone to the bit, where the block's
    output moves: then the producer feeds other layers too.
    """
    call, hidden_states = streams.first_batch()
    before = call(streams.block, hidden_states)
    rescalings = fold_factors(streams.block, members, producer, factors)
    change = (call(streams.block, hidden_states) - before).norm()
    is_unchanged = bool(change <= MAX_OUTPUT_CHANGE * before.norm())
    if not streams.process_group.broadcast_object(is_unchanged):
        fold_factors(streams.block, members, producer, 1 / factors)
        return None
    if streams.source_block is not None:
        fold_factors(streams.source_block, members, producer, factors)
    return rescalings


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
