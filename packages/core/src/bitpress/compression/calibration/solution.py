"""A layer group compressed, in two steps that a run, a resumed run and a search share: its layers
are solved, and what is stored of them is installed in the block.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence

import torch
from attrs import field, frozen
from torch import Tensor

from bitpress.checkpoint.reader import DTYPES
from bitpress.compression.calibration.layer_groups import LayerGroup
from bitpress.compression.calibration.statistics import GroupStatistics
from bitpress.output.layer_proof import LayerMeasurement, max_error, prove_stored
from bitpress.runtime import memory
from bitpress.runtime.process_group import ProcessGroup
from bitpress.schemes import pipeline
from bitpress.schemes.activation_quantizer import find_activation_quantizer
from bitpress.schemes.values import Layer, StoredLayer


@frozen(eq=False)
class Solution:
    """What is stored of a layer group.

    Attributes:
        stored_layers: of each of its layers.
        rounding_errors: by layer, ||Q - W|| / ||W|| of plain rounding, where the scheme moves
            weights further than that on purpose; empty where it does not.
    """

    stored_layers: Sequence[StoredLayer]
    rounding_errors: Mapping[str, float] = field(factory=dict)


def solve(group: LayerGroup, statistics: GroupStatistics, max_working_bytes: int = 0) -> Solution:
    """What is stored of a group after every step: proved to decode to the weights that `quantize`
    returned, and to be near to those before.

    Layers that have moved further than their scheme may move them are rounded to nearest, with a
    warning.

    Args:
        max_working_bytes: that the process may hold beyond Python and its libraries.

    Raises:
        SchemeError: a scheme returned other tensors than it planned, or such as decode to other
            weights.
    """
    steps = group.stack.steps
    layer = pipeline.quantize_whole(group.layer, steps, statistics.by_step)
    stored_layers, measured = _store(layer, group)
    if all(measurement.is_bounded for measurement in measured.values()):
        return Solution(stored_layers)

    # beside what is stored, the solution would be several copies of the weights
    del layer
    memory.release_freed_memory(max_working_bytes)
    plain = pipeline.quantize_whole(group.layer, steps, GroupStatistics.of_no_token(group).by_step)
    plain_layers, plain_measured = _store(plain, group)
    rounding_errors = {name: plain_measured[name].error for name in group.modules}
    for name, measurement in measured.items():
        limit = max_error(rounding_errors[name])
        if not measurement.error <= limit:
            warnings.warn(
                f"{name} would have moved by {measurement.error:.2f} of its norm to make up for "
                f"errors before it, and may by {limit:.2f}: rounded to nearest",
                stacklevel=2,
            )
            return Solution(plain_layers, rounding_errors)
    return Solution(stored_layers, rounding_errors)


def _store(
    layer: Layer, group: LayerGroup
) -> tuple[list[StoredLayer], dict[str, LayerMeasurement]]:
    """What is stored of each of the group's layers, and how far it is from its weight."""
    stack = group.stack
    heights = [entry.shape[0] for entry in stack.members.values()]
    stored_layers, measured = [], {}
    members = pipeline.split(layer, heights)
    for (name, weight), member in zip(group.weights.items(), members, strict=True):
        packed = pipeline.pack(member, stack.steps)
        stored = pipeline.serialize(packed, stack.steps)
        stack.check_stored(name, stored)
        measured[name] = prove_stored(stored, stack.steps, member.weight, weight.float())
        # in the planned order and with the planned config: what a resumed run finds in the files
        planned, config = stack.describe_stored(name)
        tensors = {suffix: stored.tensors[suffix].to(weight.device) for suffix in planned}
        stored_layers.append(StoredLayer(tensors, config))
    return stored_layers, measured


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
        weight.copy_(dequantized)
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
    expected = sample.float() @ weight.float().T  # (tokens, out)
    norm = float(expected.norm(dtype=torch.float64))
    error = (sample.float() @ dequantized.T - expected).norm(dtype=torch.float64)
    return float(error) / norm if norm else 0.0
