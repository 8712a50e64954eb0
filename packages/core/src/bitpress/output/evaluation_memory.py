"""Memory that an evaluation needs, and what it keeps where."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from bitpress.checkpoint.layer_names import block_index
from bitpress.errors import RecipeError
from bitpress.modeling.block_runner import RunnableModel
from bitpress.planning import memory_estimate
from bitpress.runtime import devices, memory

# Tensors of logits' size that each model holds while predictions are compared: logits, their
# logarithms, and what is made of those on the way to a sum.
LOGITS_TENSORS = 4


def estimate_memory(
    models: Sequence[RunnableModel], num_sequences: int, length: int
) -> tuple[int, int]:
    """Bytes that `evaluate` holds with hidden states on disk, and in memory, beyond what the
    interpreter takes.

    Args:
        num_sequences: that are predicted, of `length` tokens each.
    """
    on_disk = estimate_computing(models, length)
    _, hidden_size = _count_channels(models[0])
    num_states = len(models) * num_sequences * length * hidden_size
    return on_disk, on_disk + memory_estimate.NUMBER_BYTES * num_states


def estimate_computing(
    models: Sequence[RunnableModel], length: int, *, by_layer: bool = False
) -> int:
    """Bytes that `evaluate` holds of weights, and of what is made of a batch, where it computes.

    Args:
        length: tokens of a sequence.
        by_layer: whether there is one layer of a block at a time.
    """
    outside = {
        name: entry.numel
        for name, entry in models[0].checkpoint.entries.items()
        if block_index(name, models[0].container) is None
    }
    heads = [count for name, count in outside.items() if "lm_head" in name]
    embeddings = sum(outside.values()) - sum(heads)
    # without a head of its own, a model has that of its embeddings
    head = sum(heads) or max(outside.values(), default=0)
    width, hidden_size = _count_channels(models[0])
    batch_tokens = max(memory_estimate.BATCH_TOKENS, length)
    activations = batch_tokens * (
        memory_estimate.WIDE_ACTIVATIONS * width + memory_estimate.HIDDEN_ACTIVATIONS * hidden_size
    )
    # the next batch's hidden states are there already
    states_ahead = len(models) * batch_tokens * hidden_size
    # the first block is run while the embeddings are there
    running = embeddings + _count_block(models[0], by_layer) + activations + states_ahead
    comparing = head + LOGITS_TENSORS * len(models) * memory_estimate.MAX_LOGITS
    return memory_estimate.NUMBER_BYTES * max(running, comparing)


def choose_folder(
    models: Sequence[RunnableModel], input_ids: Tensor, max_memory: int | None, folder: Path
) -> Path | None:
    """Where an evaluation keeps its hidden states: in memory (None) where that is allowed, else in
    a folder.

    Args:
        input_ids: the text, (sequences, length).
        max_memory: bytes of the process; None: half of what is free.

    Raises:
        RecipeError: `max_memory` is too low for either.
    """
    on_disk, in_memory = (
        memory.TRANSFORMERS_BYTES + num_bytes
        for num_bytes in estimate_memory(models, *input_ids.shape)
    )
    if max_memory is None:
        max_memory = memory.TRANSFORMERS_BYTES + memory.available_bytes() // 2
    elif max_memory < on_disk:
        raise RecipeError(memory.describe_shortage("running the model", on_disk, max_memory))
    return folder if in_memory > max_memory else None


def choose_brought_bytes(
    models: Sequence[RunnableModel],
    length: int,
    device: torch.device,
    max_device_memory: int | None = None,
) -> int | None:
    """What a GPU has at a time of weights that stay in the host's memory, as a `DecoderOptions` has
    it; None where blocks fit the device that computes.

    Args:
        length: tokens of a sequence.
        max_device_memory: bytes of the GPU; None: what is free there.

    Raises:
        RecipeError: `max_device_memory` is too low for the largest layer.
    """
    if device.type == "cpu":
        return None
    max_bytes = devices.usable_memory(device, max_device_memory)
    if estimate_computing(models, length) <= max_bytes:
        return None
    least = estimate_computing(models, length, by_layer=True)
    devices.require_memory(device, least, max_device_memory)
    return memory_estimate.NUMBER_BYTES * max(map(_count_matrix, models))


def _count_block(model: RunnableModel, by_layer: bool) -> int:
    """Numbers of the largest block, or of its largest layer and what is no layer."""
    blocks: dict[int, int] = {}
    for name, entry in model.checkpoint.entries.items():
        index = block_index(name, model.container)
        if index is not None and not (by_layer and len(entry.shape) > 1):
            blocks[index] = blocks.get(index, 0) + entry.numel
    return max(blocks.values(), default=0) + (_count_matrix(model) if by_layer else 0)


def _count_matrix(model: RunnableModel) -> int:
    """Numbers of the largest layer of all blocks: experts in one tensor are brought one by one."""
    return max(
        (
            math.prod(entry.shape[-2:])
            for name, entry in model.checkpoint.entries.items()
            if len(entry.shape) > 1 and block_index(name, model.container) is not None
        ),
        default=0,
    )


def _count_channels(model: RunnableModel) -> tuple[int, int]:
    """Channels of the widest layer of all blocks, and of hidden states."""
    shapes = [
        entry.shape
        for name, entry in model.checkpoint.entries.items()
        if len(entry.shape) == 2 and block_index(name, model.container) is not None
    ]
    # a block without matrices has next to no channels
    width = max((max(shape) for shape in shapes), default=1)
    return width, min((shape[1] for shape in shapes), default=1)
