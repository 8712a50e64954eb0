"""The head, fitted to data once all blocks are compressed: to what these make of the texts."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

from torch import Tensor

from bitpress.compression.calibration.activation_streams import ActivationStreams, GroupInputs
from bitpress.compression.calibration.block import WriteTensor
from bitpress.compression.calibration.block_result import BlockResult
from bitpress.compression.calibration.layer_groups import LayerGroup
from bitpress.compression.calibration.solution import Solution, solve_in_tiles
from bitpress.compression.calibration.statistics import GroupStatistics, gather_statistics
from bitpress.errors import CheckpointError
from bitpress.modeling.capture import ExtraOutputs, open_head_inputs
from bitpress.modeling.decoder import Decoder
from bitpress.planning.layout import Stack
from bitpress.runtime import memory

# From hidden states (tokens, channels) after the last block to what the head is given (tokens, in).
HeadInputs = Callable[[Tensor], Tensor]


def compress_head(
    stack: Stack,
    streams: ActivationStreams,
    decoder: Decoder,
    extra_outputs: ExtraOutputs,
    write_tensor: WriteTensor,
) -> BlockResult:
    """Let rank 0 write the head, fitted to what all ranks observe; returns what was measured.

    Nothing is observed of gradients: rows do not make up for each other's errors.

    Args:
        streams: that stand after the last block.
        extra_outputs: what blocks return with their outputs.
        write_tensor: is given every stored tensor by name.
    """
    process_group = streams.process_group
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        statistics = _observe(stack, streams, decoder, extra_outputs)
        memory.release_freed_memory(streams.limits.max_working_bytes)
        solution = Solution([])
        with process_group.agreeing():
            if process_group.is_rank_zero:
                with streams.limits.lanes.offer():
                    solution = solve_in_tiles(stack, statistics, decoder.reader, streams.device)
    for name, stored in zip(stack.members, solution.stored_layers, strict=False):
        for suffix, tensor in stored.tensors.items():
            write_tensor(f"{name}.{suffix}", tensor)
    texts = dict.fromkeys(str(w.message) for w in caught if w.category is UserWarning)
    result = BlockResult(
        output_errors={},
        rescaled={},
        warnings=[f"{stack.name}: {text}" for text in texts],
        num_tokens={},
        rounding_errors=solution.rounding_errors,
    )
    return process_group.broadcast_object(result)


def _observe(
    stack: Stack, streams: ActivationStreams, decoder: Decoder, extra_outputs: ExtraOutputs
) -> GroupStatistics:
    (name,) = stack.members
    module = decoder.find_layer(name)
    if module is None:
        raise CheckpointError(
            f"transformers' {type(decoder.model).__name__} has no layer {name}: it cannot be "
            "fitted to data; options that need no data can be used for it"
        )
    with open_head_inputs(decoder, module, extra_outputs) as head_inputs:
        group = LayerGroup(stack, {name: module}, first_layer=name)
        return gather_statistics(group, _inputs(streams, head_inputs), streams)


def _inputs(streams: ActivationStreams, head_inputs: HeadInputs) -> Iterator[GroupInputs]:
    """Of each batch, those first that the source is run on too."""
    reference = streams.reference
    positions = {} if reference is None else {b: i for i, b in enumerate(reference.batches)}

    def bring(batch: int) -> GroupInputs:
        inputs = head_inputs(streams.states.bring(batch, streams.device).flatten(0, -2))
        if reference is None or batch not in positions:
            return GroupInputs(inputs)
        source_states = reference.states.bring(positions[batch], streams.device)
        return GroupInputs(inputs, head_inputs(source_states.flatten(0, -2)))

    order = sorted(range(len(streams.states)), key=lambda batch: batch not in positions)
    yield from streams.limits.lanes.map(bring, order)
