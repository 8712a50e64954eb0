"""A layer group compressed, in three steps that a run, a resumed run and a search share: its layers
are solved, stored, and installed in the block.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from bitpress.checkpoint.reader import DTYPES
from bitpress.compression.calibration.layer_groups import LayerGroup
from bitpress.compression.calibration.statistics import GroupStatistics
from bitpress.runtime.process_group import ProcessGroup
from bitpress.schemes import pipeline
from bitpress.schemes.activation_quantizer import find_activation_quantizer
from bitpress.schemes.values import Layer, StoredLayer


def solve(group: LayerGroup, statistics: GroupStatistics) -> Layer:
    """The group's layers, as one, after every step's `quantize`; not yet packed."""
    return pipeline.quantize_whole(group.layer, group.stack.steps, statistics.by_step)


def store(layer: Layer, group: LayerGroup) -> list[StoredLayer]:
    """What is stored of each of the group's layers.

    Args:
        layer: all of them as one, solved.

    Raises:
        SchemeError: a scheme returned other tensors than it planned.
    """
    stack = group.stack
    heights = [entry.shape[0] for entry in stack.members.values()]
    stored_layers = []
    members = pipeline.split(layer, heights)
    for (name, weight), member in zip(group.weights.items(), members, strict=True):
        stored = pipeline.serialize(pipeline.pack(member, stack.steps), stack.steps)
        stack.check_stored(name, stored)
        # in the planned order and with the planned config: what a resumed run finds in the files
        planned, config = stack.describe_stored(name)
        tensors = {suffix: stored.tensors[suffix].to(weight.device) for suffix in planned}
        stored_layers.append(StoredLayer(tensors, config))
    return stored_layers


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
            errors[name] = _output_error(sample, weight, dequantized)
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
    norm = float(expected.norm())
    return float((sample.float() @ dequantized.T - expected).norm()) / norm if norm else 0.0
