"""A run without calibration: shard by shard, stack by stack, in row tiles that stay in a core's
cache, or keep a GPU busy.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

import torch

from bitpress.checkpoint.reader import Reader
from bitpress.checkpoint.safetensors import Entry
from bitpress.checkpoint.writer import OutputFolder, ShardWriter, copy_entry
from bitpress.compression.resources import Resources
from bitpress.errors import CheckpointError
from bitpress.planning.layout import Shard, Stack
from bitpress.planning.plan import Plan
from bitpress.runtime.devices import ThreadDevices
from bitpress.runtime.process_group import ProcessGroup
from bitpress.runtime.progress import ReportProgress
from bitpress.schemes import pipeline, stored_layout
from bitpress.schemes.values import Layer

# Weights of a row tile on a GPU, where each step costs the same few microseconds however few
# weights it is given.
GPU_TILE_WEIGHTS = 1 << 22


def write_shards(
    plan: Plan, output: OutputFolder, resources: Resources, report_progress: ReportProgress
) -> None:
    """Write this rank's shards, but for those that an earlier run of the same plan has finished.

    Args:
        report_progress: called with the bytes of the source that are done.
    """
    pinned = any(device.type == "cuda" for device in resources.devices)
    with Reader(pinned=pinned) as reader:
        for shard in select_shards(plan, resources.process_group):
            write_shard(shard, output, reader, resources, report_progress)


def select_shards(plan: Plan, process_group: ProcessGroup) -> list[Shard]:
    """The part of the shards that is this rank's."""
    return process_group.partition_by_size(plan.shards, lambda shard: shard.source_bytes)


def write_shard(
    shard: Shard,
    output: OutputFolder,
    reader: Reader,
    resources: Resources,
    report_progress: ReportProgress,
) -> None:
    """Write a shard unless an earlier run has; its stacks need no calibration."""
    if output.has_shard(shard.name, shard.header):
        report_progress(shard.source_bytes)
        return
    with output.shard(shard.name, shard.header) as writer:
        _fill_shard(shard, reader, writer, resources, report_progress)


def compress_stack(
    stack: Stack, reader: Reader, device: torch.device
) -> Iterator[tuple[str, torch.Tensor]]:
    """The stored tensors of a stack by name, one member after the other.

    Raises:
        CheckpointError: a weight is NaN or infinite; the message names the tensor.
        SchemeError: the scheme returned other tensors than it planned.
    """
    read_tiles = functools.partial(_read_tiles, stack, reader, device)
    stats = pipeline.observe_weights(
        lambda: (tile for module in stack.members for tile in read_tiles(module)), stack.steps
    )

    for module in stack.members:
        packed = (
            pipeline.pack(pipeline.quantize(tile, stack.steps, stats), stack.steps)
            for tile in read_tiles(module)
        )
        layer = pipeline.join(packed, stack.members[module].shape)
        stored = pipeline.serialize(layer, stack.steps)
        stack.check_stored(module, stored)
        yield from ((f"{module}.{suffix}", tensor) for suffix, tensor in stored.tensors.items())


def _read_tiles(stack: Stack, reader: Reader, device: torch.device, module: str) -> Iterator[Layer]:
    """The row tiles of a member, (rows, in) float32 each; raises CheckpointError for NaN or Inf."""
    entry = stack.members[module]
    num_weights = stored_layout.WEIGHTS_PER_TILE if device.type == "cpu" else GPU_TILE_WEIGHTS
    for first, last in stored_layout.row_tiles(entry.shape, stack.steps, num_weights):
        # torch does not reuse pinned memory before a copy out of it has ended
        weight = reader.rows(entry, first, last).to(device, non_blocking=True).float()
        # one cheap pass: a NaN or Inf anywhere makes the sum so
        if not math.isfinite(weight.sum()):
            _refuse_non_finite(entry, first, weight)
        yield Layer(stack.name, weight, stack.dtype)


def _refuse_non_finite(entry: Entry, first: int, weight: torch.Tensor) -> None:
    """Raise if a number is not finite; a sum of finite numbers may overflow."""
    positions = (~weight.isfinite()).nonzero()
    if len(positions):
        row, column = positions[0].tolist()
        raise CheckpointError(
            f"{entry.file}: tensor {entry.name} has {weight[row, column].item()} at row "
            f"{first + row}, column {column}; the source is damaged: fetch it again, or leave the "
            "layer out with --ignore"
        )


def _fill_shard(
    shard: Shard,
    reader: Reader,
    writer: ShardWriter,
    resources: Resources,
    report_progress: ReportProgress,
) -> None:
    """Write all tensors of a shard, several stacks side by side; the bytes do not depend on which
    is done first.
    """
    entries = {entry.name: entry for entry in shard.header.entries}
    thread_devices = ThreadDevices(resources.devices)

    def write_stack(stack: Stack) -> None:
        for name, tensor in compress_stack(stack, reader, thread_devices.device):
            writer.write(entries[name], tensor.cpu())
        report_progress(stack.source_bytes)

    def write_copy(entry: Entry) -> None:
        copy_entry(entry, entries[entry.name], reader, writer)
        report_progress(entry.nbytes)

    pool = ThreadPoolExecutor(resources.num_threads, initializer=thread_devices.assign)
    try:
        futures = [pool.submit(write_stack, stack) for stack in shard.stacks]
        futures += [pool.submit(write_copy, entry) for entry in shard.copies]
        for future in wait(futures, return_when=FIRST_EXCEPTION).done:
            future.result()
    finally:
        pool.shutdown(cancel_futures=True)
