"""Data-free work: shard by shard, stack by stack, in row tiles that stay in a core's cache, or keep
a GPU busy.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

import torch

from bitpress.checkpoint.reader import Reader
from bitpress.checkpoint.safetensors import Entry
from bitpress.checkpoint.writer import OutputFolder, ShardWriter, copy_entry
from bitpress.errors import CheckpointError
from bitpress.planning.layout import Shard, Stack
from bitpress.planning.plan import Plan
from bitpress.runtime.devices import Turns
from bitpress.runtime.process_group import ALONE, Ranks
from bitpress.runtime.progress import Told
from bitpress.schemes import pipeline, stored_layout
from bitpress.schemes.values import Layer

# weights of a row tile there, where each step costs the same some microseconds however few they are
ON_GPU = 1 << 22


def write_shards(
    plan: Plan,
    output: OutputFolder,
    threads: int,
    devices: Sequence[torch.device],
    progress: Told,
    ranks: Ranks = ALONE,
) -> None:
    """Write this rank's shards, but for those that an earlier run of the same plan has finished.

    Args:
        devices: which the threads share.
        progress: is told the source bytes done.
    """
    with Reader(pinned=any(device.type == "cuda" for device in devices)) as reader:
        for shard in own(plan, ranks):
            write_shard(shard, output, reader, threads, devices, progress)


def own(plan: Plan, ranks: Ranks) -> list[Shard]:
    """The shards that fall to a rank."""
    return ranks.deal(plan.shards, lambda shard: shard.source_bytes)


def write_shard(
    shard: Shard,
    output: OutputFolder,
    reader: Reader,
    threads: int,
    devices: Sequence[torch.device],
    progress: Told,
) -> None:
    """Write a shard unless an earlier run has; its stacks need no data."""
    if output.finished(shard.name, shard.header):
        progress(shard.source_bytes)
        return
    with output.shard(shard.name, shard.header) as writer:
        _fill(shard, reader, writer, threads, Turns(devices), progress)


def compress_stack(
    stack: Stack, reader: Reader, device: torch.device
) -> Iterator[tuple[str, torch.Tensor]]:
    """The stored tensors of a stack by name, one member after the other.

    Raises:
        CheckpointError: a weight is NaN or infinite; the message names the tensor.
        SchemeError: the scheme returned other tensors than it planned.
    """
    tiles = functools.partial(_tiles, stack, reader, device)
    stats = pipeline.observe_weights(
        lambda: (tile for module in stack.members for tile in tiles(module)), stack.steps
    )
    for module in stack.members:
        packed = (
            pipeline.pack(pipeline.quantize(tile, stack.steps, stats), stack.steps)
            for tile in tiles(module)
        )
        record = pipeline.record(pipeline.join(packed, stack.members[module].shape), stack.steps)
        stack.check_stored(module, record)
        yield from ((f"{module}.{suffix}", tensor) for suffix, tensor in record.tensors.items())


def _tiles(stack: Stack, reader: Reader, device: torch.device, module: str) -> Iterator[Layer]:
    entry = stack.members[module]
    for first, last in stored_layout.row_tiles(
        entry.shape, stack.steps, stored_layout.TILE if device.type == "cpu" else ON_GPU
    ):
        # torch keeps pinned memory from being taken anew until a copy out of it is over
        weight = reader.rows(entry, first, last).to(device, non_blocking=True).float()
        # one cheap pass: a NaN or Inf anywhere makes the sum so
        if not math.isfinite(weight.sum()):
            _refuse_non_finite(entry, first, weight)
        yield Layer(stack.name, weight, stack.dtype)


def _refuse_non_finite(entry: Entry, first: int, weight: torch.Tensor) -> None:
    """Raise if a number is not finite; a sum of finite numbers may overflow."""
    bad = (~weight.isfinite()).nonzero()
    if len(bad):
        row, column = bad[0].tolist()
        raise CheckpointError(
            f"{entry.file}: tensor {entry.name} has {weight[row, column].item()} at row "
            f"{first + row}, column {column}; "
            "the source is damaged: fetch it again, or leave the layer out with --ignore"
        )


def _fill(
    shard: Shard, reader: Reader, writer: ShardWriter, threads: int, turns: Turns, progress: Told
) -> None:
    """Write all tensors of a shard, several stacks side by side; the bytes do not depend on who is
    first.
    """
    places = {entry.name: entry for entry in shard.header.entries}

    def work(stack: Stack) -> None:
        for name, tensor in compress_stack(stack, reader, turns.device):
            writer.write(places[name], tensor.cpu())
        progress(stack.source_bytes)

    def copy(entry: Entry) -> None:
        copy_entry(entry, places[entry.name], reader, writer)
        progress(entry.nbytes)

    pool = ThreadPoolExecutor(threads, initializer=turns.take)
    try:
        futures = [pool.submit(work, stack) for stack in shard.stacks] + [
            pool.submit(copy, entry) for entry in shard.copies
        ]
        for future in wait(futures, return_when=FIRST_EXCEPTION).done:
            future.result()
    finally:
        pool.shutdown(cancel_futures=True)
