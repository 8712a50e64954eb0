"""A run without calibration: shard by shard, stack by stack, in row tiles that stay in a core's
cache, or keep a GPU busy.
"""

from __future__ import annotations

import functools
import math
import operator
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

import torch
from attrs import frozen

from bitpress.checkpoint.dequantized_source import DequantizedView
from bitpress.checkpoint.reader import Reader
from bitpress.checkpoint.safetensors import Entry
from bitpress.checkpoint.writer import OutputFolder, ShardWriter, copy_entry
from bitpress.compression.resources import Resources
from bitpress.errors import CheckpointError, SchemeError
from bitpress.output.layer_proof import LayerMeasurement, prove_stored
from bitpress.planning.layout import Shard, Stack
from bitpress.planning.plan import Plan
from bitpress.runtime.devices import ThreadDevices
from bitpress.runtime.lanes import Lanes, offered_lanes
from bitpress.runtime.logger import logger, warn
from bitpress.runtime.process_group import ProcessGroup
from bitpress.runtime.progress import FINISHED_EARLIER, ReportProgress, copy_work
from bitpress.schemes import pipeline, stored_layout
from bitpress.schemes.values import Layer, QuantizedTensor, StoredLayer

# Weights of a row tile on a GPU, where each step costs the same few microseconds however few
# weights it is given.
GPU_TILE_WEIGHTS = 1 << 22


@frozen(eq=False)
class _ProvedTile:
    """A row tile whose stored numbers decode to what `quantize` returned.

    Attributes:
        rows: the first, and the one after the last.
        stored: what is stored of them.
        measured: on that.
    """

    rows: tuple[int, int]
    stored: StoredLayer
    measured: LayerMeasurement


def write_shards(
    plan: Plan, output: OutputFolder, resources: Resources, report_progress: ReportProgress
) -> dict[str, LayerMeasurement]:
    """Write this rank's shards, but for those that an earlier run of the same plan has finished;
    returns what was measured of each layer that was written.

    Args:
        report_progress: called with the work that is done, that of a shard being its `work_bytes`.
    """
    measured: dict[str, LayerMeasurement] = {}
    pinned = any(device.type == "cuda" for device in resources.devices)
    with Reader(pinned=pinned) as reader:
        for shard in select_shards(plan, resources.process_group):
            measured |= write_shard(shard, output, reader, resources, report_progress)
    return measured


def select_shards(plan: Plan, process_group: ProcessGroup) -> list[Shard]:
    """The part of the shards that is this rank's."""
    return process_group.partition_by_size(plan.shards, lambda shard: shard.source_bytes)


def write_shard(
    shard: Shard,
    output: OutputFolder,
    reader: Reader,
    resources: Resources,
    report_progress: ReportProgress,
) -> dict[str, LayerMeasurement]:
    """Write a shard unless an earlier run has; its stacks need no calibration. Returns what was
    measured of the layers that were written.
    """
    if output.has_shard(shard.name, shard.header, resources.num_threads):
        report_progress(shard.work_bytes, f"{shard.name} · {FINISHED_EARLIER}")
        return {}
    with output.shard(shard.name, shard.header) as writer:
        return _fill_shard(shard, reader, writer, resources, report_progress)


def compress_stack(
    stack: Stack,
    reader: Reader,
    device: torch.device,
    is_proved: bool = True,
    input_stats: Sequence[pipeline.Statistics] = (),
) -> Iterator[tuple[str, StoredLayer, LayerMeasurement]]:
    """What is stored of each member of a stack, and what was measured of it.

    Args:
        input_stats: per step, of the stack's inputs, where something is fitted to these.
        is_proved: whether every row tile is proved to decode to the weight that `quantize`
            returned, and the stored layer to hold the tiles; otherwise nothing is measured.

    Raises:
        CheckpointError: a weight is NaN or infinite; the message names the tensor.
        SchemeError: the scheme returned other tensors than it planned, or such as decode to other
            weights.
    """
    is_fitted = bool(input_stats) and any(map(pipeline.takes_second_moments, stack.steps))
    num_weights = _tile_weights(device, is_fitted)
    tiles_of = {
        module: list(stored_layout.row_tiles(entry.shape, stack.steps, num_weights))
        for module, entry in stack.members.items()
    }
    read_tile = functools.partial(_read_tile, stack, reader, device)
    weight_stats = pipeline.observe_weights(
        lambda: (read_tile(module, rows) for module in stack.members for rows in tiles_of[module]),
        stack.steps,
    )
    stats = [
        {**inputs, **weights}
        for inputs, weights in zip(
            input_stats or [{} for _ in stack.steps], weight_stats, strict=True
        )
    ]
    for module, entry in stack.members.items():
        compress_tile = functools.partial(
            _compress_tile, stack, stats, functools.partial(read_tile, module), is_proved
        )
        proved: list[_ProvedTile] = []
        # the rows of a large tile are solved side by side
        lanes = Lanes() if is_fitted else offered_lanes()
        tiles = lanes.map(compress_tile, tiles_of[module])
        stored = pipeline.serialize(
            pipeline.join(_take_proved(tiles, proved), entry.shape), stack.steps
        )
        stack.check_stored(module, stored)
        _require_tiles(stack, module, stored, proved)
        measured = (tile.measured for tile in proved)
        measurement = functools.reduce(operator.or_, measured, LayerMeasurement())
        if stack.keeps_codes and measurement.error:
            warn(
                f"{module}: the source has scales or codes that {stack.steps[-1].scheme.name} "
                "cannot store: rounded to nearest",
                stacklevel=3,
            )
        yield module, stored, measurement


def _compress_tile(
    stack: Stack,
    stats: Sequence[pipeline.Statistics],
    read_tile: Callable[[tuple[int, int]], Layer],
    is_proved: bool,
    rows: tuple[int, int],
) -> tuple[Layer, _ProvedTile | None]:
    """A row tile quantized and packed, and what is proved of it; None where nothing is."""
    tile = read_tile(rows)
    own_stats = [pipeline.take_rows(step_stats, *rows) for step_stats in stats]
    quantized = pipeline.quantize(tile, stack.steps, own_stats)
    packed = pipeline.pack(quantized, stack.steps)
    if not is_proved:
        return packed, None
    stored = pipeline.serialize(packed, stack.steps)
    measured = prove_stored(stored, stack.steps, quantized.weight, tile.weight)
    return packed, _ProvedTile(rows, stored, measured)


def _take_proved(
    tiles: Iterable[tuple[Layer, _ProvedTile | None]], proved: list[_ProvedTile]
) -> Iterator[Layer]:
    """The packed tiles; what is proved of each is added to a list."""
    for packed, proved_tile in tiles:
        if proved_tile is not None:
            proved.append(proved_tile)
        yield packed


def _require_tiles(
    stack: Stack, module: str, stored: StoredLayer, proved: Sequence[_ProvedTile]
) -> None:
    """Raise SchemeError unless a stored layer decodes to what its tiles decode to."""
    shape, steps = stack.members[module].shape, stack.steps
    for tile in proved:
        cut = stored_layout.cut_rows(
            stored.tensors, (shape[0], shape[1]), stack.dtype, steps, tile.rows
        )
        if all(_is_same(tensor, tile.stored.tensors[suffix]) for suffix, tensor in cut.items()):
            continue
        # what counts the rows, as offsets do, differs between a tile and the layer
        weights = [
            pipeline.dequantize(tensors, stored.config, steps)
            for tensors in (cut, tile.stored.tensors)
        ]
        if not torch.equal(*weights):
            first, last = tile.rows
            raise SchemeError(
                f"{steps[-1].scheme}: rows {first} to {last} of layer {module} are not stored as "
                "they are stored by themselves"
            )


def _is_same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are equal to the bit."""
    if a.shape != b.shape:
        return False
    return torch.equal(*(x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b)))


def _tile_weights(device: torch.device, is_fitted: bool) -> int:
    """Weights of a row tile.

    Args:
        is_fitted: to second moments, which are factorized for every tile.
    """
    if is_fitted:
        return stored_layout.FITTED_TILE_WEIGHTS
    return stored_layout.WEIGHTS_PER_TILE if device.type == "cpu" else GPU_TILE_WEIGHTS


def _read_tile(
    stack: Stack, reader: Reader, device: torch.device, module: str, rows: tuple[int, int]
) -> Layer:
    """A row tile of a member, (rows, in) float32; raises CheckpointError for NaN or Inf."""
    (first, last), entry = rows, stack.members[module]
    has_codes = all(isinstance(member, DequantizedView) for member in stack.members.values())
    # layers of a stack share scales: what is done for one is done for all
    if isinstance(entry, DequantizedView) and has_codes:
        decoded = entry.decode_rows(reader, first, last, device)
    else:
        decoded = reader.rows(entry, first, last, device).float()
    quantized = decoded if isinstance(decoded, QuantizedTensor) else None
    weight = decoded.dequantize() if isinstance(decoded, QuantizedTensor) else decoded
    # one cheap pass: a NaN or Inf anywhere makes the sum so
    if not math.isfinite(weight.sum()):
        _refuse_non_finite(entry, first, weight)
    return Layer(stack.name, weight, stack.dtype, quantized=quantized)


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
) -> dict[str, LayerMeasurement]:
    """Write all tensors of a shard, several stacks side by side; the bytes do not depend on which
    is done first.
    """
    measured: dict[str, LayerMeasurement] = {}
    entries = {entry.name: entry for entry in shard.header.entries}
    thread_devices = ThreadDevices(resources.devices)

    def write_stack(stack: Stack) -> None:
        start = time.monotonic()
        for module, stored, measurement in compress_stack(
            stack, reader, thread_devices.device, resources.is_proved
        ):
            for suffix, tensor in stored.tensors.items():
                writer.write(entries[f"{module}.{suffix}"], tensor.cpu())
            measured[module] = measurement
            error, seconds = measurement.error, time.monotonic() - start
            logger.debug("%s: relative error %.5f, %.2f s", module, error, seconds)
        report_progress(stack.source_bytes, stack.short_name)

    def write_copy(entry: Entry) -> None:
        copy_entry(entry, entries[entry.name], reader, writer)
        report_progress(copy_work(entry.nbytes), entry.name)

    pool = ThreadPoolExecutor(resources.num_threads, initializer=thread_devices.assign)
    try:
        futures = [pool.submit(write_stack, stack) for stack in shard.stacks]
        futures += [pool.submit(write_copy, entry) for entry in shard.copies]
        for future in wait(futures, return_when=FIRST_EXCEPTION).done:
            future.result()
    finally:
        pool.shutdown(cancel_futures=True)
    return measured
