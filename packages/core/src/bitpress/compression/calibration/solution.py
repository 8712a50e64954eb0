"""A layer group compressed, in two steps that a run, a resumed run and a search share: its layers
are solved, and what is stored of them is installed in the block.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import TypeAlias

import torch
from attrs import evolve, field, frozen
from torch import Tensor

from bitpress.checkpoint.reader import DTYPES, Reader
from bitpress.compression.calibration.activation_streams import StreamLimits
from bitpress.compression.calibration.layer_groups import LayerGroup
from bitpress.compression.calibration.statistics import GroupStatistics
from bitpress.compression.data_free import compress_stack
from bitpress.numerics.gram import product_dtype, project
from bitpress.output.layer_proof import LayerMeasurement, max_error, prove_stored
from bitpress.planning.layout import Stack
from bitpress.runtime import memory
from bitpress.runtime.batching import map_batched
from bitpress.runtime.lanes import Lanes
from bitpress.runtime.process_group import ProcessGroup
from bitpress.schemes import pipeline
from bitpress.schemes.activation_quantizer import find_activation_quantizer
from bitpress.schemes.values import Layer, StoredLayer

# Of each layer of a stack what is stored, and how far that is from its weight.
_Members: TypeAlias = dict[str, tuple[StoredLayer, LayerMeasurement]]


# What the coroutine warns of that solves a group.
_TEXTS: ContextVar[list[str] | None] = ContextVar("_TEXTS", default=None)


@frozen(eq=False)
class Solution:
    """What is stored of a layer group.

    Attributes:
        stored_layers: of each of its layers.
        rounding_errors: by layer, ||Q - W|| / ||W|| of plain rounding, where the scheme moves
            weights further than that on purpose; empty where it does not.
        warnings: what solving it has warned of, one line each.
    """

    stored_layers: Sequence[StoredLayer]
    rounding_errors: Mapping[str, float] = field(factory=dict)
    warnings: Sequence[str] = ()


def solve_side_by_side(
    groups: Sequence[tuple[LayerGroup, GroupStatistics]], limits: StreamLimits
) -> list[Solution]:
    """What `solve` gives for groups that wait for none of each other, each with its warnings: those
    of each lane with a batch axis, or a single one in all lanes.
    """
    is_alone = len(groups) == 1
    # a lane must not wait for another
    lanes, own_limits = (
        (Lanes(), limits) if is_alone else (limits.lanes, evolve(limits, lanes=Lanes()))
    )
    # the rows of a single group may be solved in threads that do not know whose they are
    shared_texts: list[str] = []

    def keep_warning(message: Warning | str, category: type[Warning], *place: object) -> None:
        if category is UserWarning:
            own_texts = _TEXTS.get()
            (shared_texts if own_texts is None else own_texts).append(str(message))

    def solve_one(group: tuple[LayerGroup, GroupStatistics]) -> Solution:
        texts = shared_texts if is_alone else []
        _TEXTS.set(texts)
        solution = solve(*group, own_limits)
        return evolve(solution, warnings=tuple(texts))

    per_lane = math.ceil(len(groups) / lanes.num_lanes) or 1
    batches = [groups[i : i + per_lane] for i in range(0, len(groups), per_lane)]
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        # recorded warnings do not say which group they are of
        warnings.showwarning = keep_warning  # type: ignore[assignment]
        solved = lanes.map(functools.partial(map_batched, solve_one), batches)
        return [solution for batch in solved for solution in batch]


def solve(group: LayerGroup, statistics: GroupStatistics, limits: StreamLimits) -> Solution:
    """What is stored of a group after every step: proved to decode to the weights that `quantize`
    returned, and to be near to those before.

    Layers that have moved further than their scheme may move them are rounded to nearest, with a
    warning.

    Args:
        limits: rows, and layers, are computed side by side in its lanes.

    Raises:
        SchemeError: a scheme returned other tensors than it planned, or such as decode to other
            weights.
    """
    steps = group.stack.steps
    with limits.lanes.offer():
        if group.stack.keeps_codes:
            return Solution(_keep_codes(group, statistics))
        layer = pipeline.quantize_whole(group.layer, steps, statistics.by_step)
        fitted = _store(layer, group, limits.lanes)
        if _is_bounded(fitted):
            return Solution(_stored_layers(fitted))

        # beside what is stored, the solution would be several copies of the weights
        del layer
        memory.release_freed_memory(limits.max_working_bytes)
        no_statistics = GroupStatistics.of_no_token(group).by_step
        plain = pipeline.quantize_whole(group.layer, steps, no_statistics)
        return _require_near(fitted, _store(plain, group, limits.lanes))


def solve_in_tiles(
    stack: Stack, statistics: GroupStatistics, reader: Reader, device: torch.device
) -> Solution:
    """The same for a stack that is too large to be solved whole: its row tiles are read and solved
    one after the other, so that rows of two do not make up for each other's errors.
    """
    fitted = _compress_tiles(stack, statistics, reader, device)
    if _is_bounded(fitted):
        return Solution(_stored_layers(fitted))
    return _require_near(fitted, _compress_tiles(stack, None, reader, device))


def _require_near(fitted: _Members, plain: _Members) -> Solution:
    """What is fitted, or plain rounding where that has moved a layer further than it may."""
    rounding_errors = {name: measurement.error for name, (_, measurement) in plain.items()}
    for name, (_, measurement) in fitted.items():
        limit = max_error(rounding_errors[name])
        if not measurement.error <= limit:
            warnings.warn(
                f"{name} would have moved by {measurement.error:.2f} of its norm to make up for "
                f"errors before it, and may by {limit:.2f}: rounded to nearest",
                stacklevel=3,
            )
            return Solution(_stored_layers(plain), rounding_errors)
    return Solution(_stored_layers(fitted), rounding_errors)


def _is_bounded(members: _Members) -> bool:
    return all(measurement.is_bounded for _, measurement in members.values())


def _stored_layers(members: _Members) -> list[StoredLayer]:
    return [stored for stored, _ in members.values()]


def _keep_codes(group: LayerGroup, statistics: GroupStatistics) -> list[StoredLayer]:
    """What is stored of a group whose codes in the source are kept: made of what its files hold,
    since the block's weights are rounded to what it computes in.
    """
    assert group.reader is not None, "whoever solves groups reads the source"
    device = next(iter(group.weights.values())).device
    return _stored_layers(_compress_tiles(group.stack, statistics, group.reader, device))


def _compress_tiles(
    stack: Stack, statistics: GroupStatistics | None, reader: Reader, device: torch.device
) -> _Members:
    """What is stored of each member of a stack, without statistics as without data."""
    input_stats = () if statistics is None else statistics.by_step
    return {
        name: (_as_planned(stack, name, stored, device), measurement)
        for name, stored, measurement in compress_stack(
            stack, reader, device, input_stats=input_stats
        )
    }


def _as_planned(stack: Stack, name: str, stored: StoredLayer, device: torch.device) -> StoredLayer:
    """What is stored of a layer in the planned order and with the planned config: what a resumed
    run finds in the files.
    """
    planned, config = stack.describe_stored(name)
    return StoredLayer({suffix: stored.tensors[suffix].to(device) for suffix in planned}, config)


def _store(layer: Layer, group: LayerGroup, lanes: Lanes) -> _Members:
    """What is stored of each of the group's layers, and how far it is from its weight."""
    heights = [entry.shape[0] for entry in group.stack.members.values()]
    members = zip(group.weights.items(), pipeline.split(layer, heights), strict=True)
    results = lanes.map(functools.partial(_store_member, group.stack), members)
    return dict(zip(group.weights, results, strict=True))


def _store_member(
    stack: Stack, member: tuple[tuple[str, Tensor], Layer]
) -> tuple[StoredLayer, LayerMeasurement]:
    """What is stored of one layer, and how far it is from its weight.

    Args:
        member: its name and weight, and what has become of it.
    """
    (name, weight), layer = member
    packed = pipeline.pack(layer, stack.steps)
    stored = pipeline.serialize(packed, stack.steps)
    stack.check_stored(name, stored)
    measurement = prove_stored(stored, stack.steps, layer.weight, weight.float())
    return _as_planned(stack, name, stored, weight.device), measurement


def broadcast_stored(
    stored_layers: Sequence[StoredLayer] | None,
    group: LayerGroup,
    process_group: ProcessGroup,
    owner: int,
) -> Sequence[StoredLayer]:
    """What the rank that has solved a group stores of it, for all ranks.

    Args:
        stored_layers: None on every rank but the owner.
    """
    with process_group.agreeing():
        if stored_layers is None:
            stored_layers = _allocate_stored(group)
    return [
        StoredLayer(
            {
                suffix: process_group.broadcast(tensor, owner)
                for suffix, tensor in stored.tensors.items()
            },
            stored.config,
        )
        for stored in stored_layers
    ]


def install(
    stored_layers: Sequence[StoredLayer], group: LayerGroup, sample: Tensor | None = None
) -> dict[str, float]:
    """Let the block compute as the stored layers will be served: with dequantized weights, and with
    quantized inputs where a scheme quantizes them.

    Args:
        sample: (tokens, in) some of the group's inputs.

    Returns:
        By layer the output error on the sample, ||x (W - Q)ᵀ|| / ||x Wᵀ||; nothing without one.
    """
    steps = group.stack.steps
    errors = {}
    for (name, weight), stored in zip(group.weights.items(), stored_layers, strict=True):
        dequantized = pipeline.dequantize(  # (out, in) float32
            stored.tensors, stored.config, steps, tuple(weight.shape)
        )
        quantizer = find_activation_quantizer(stored.tensors, stored.config, steps)
        if quantizer is not None:
            group.input_quantizers[name] = quantizer

        # while both weights are there
        if sample is not None:
            error = _output_error(sample, weight, dequantized)
            # outputs that float32 cannot hold have none
            if math.isfinite(error):
                errors[name] = error
        group.parameters[name].copy_(dequantized)
    return errors


def _allocate_stored(group: LayerGroup) -> list[StoredLayer]:
    """Tensors of the planned dtypes and shapes, to receive what another rank stores."""
    stored_layers = []
    for name, weight in group.weights.items():
        planned, config = group.stack.describe_stored(name)
        tensors = {
            suffix: weight.new_empty(spec.shape, dtype=DTYPES[spec.dtype])
            for suffix, spec in planned.items()
        }
        stored_layers.append(StoredLayer(tensors, config))
    return stored_layers


def _output_error(sample: Tensor, weight: Tensor, dequantized: Tensor) -> float:
    """||x (W - Q)ᵀ|| / ||x Wᵀ||; 0 where the layer's output is zero."""
    x = sample.to(product_dtype(sample))
    # In 16 bits it is rounded after the subtraction, to 2**-9 of itself: less than is shown of it.
    difference = weight.float() - dequantized
    error, norm = (float(project(x, w).norm(dtype=torch.float64)) for w in (difference, weight))
    return error / norm if norm else 0.0
