"""The calibrated line from plan to files: block by block, and in each block site by site in forward
order.

A site is a stack: layers that read one input. Its inputs are observed as the already compressed
sites before it make them, it is compressed, and what a loader will compute with takes its place;
then the next. So every layer is fitted to what it will be given in service. Every eighth batch is
run through the source's weights as well, for schemes that ask how far the inputs have drifted.
"""

from __future__ import annotations

import json

import torch
from torch import nn

from bitpress.checkpoint.filenames import BLOCK_RESULT_SUFFIX
from bitpress.checkpoint.reader import DTYPES, Reader
from bitpress.checkpoint.safetensors import read_header
from bitpress.checkpoint.writer import OutputFolder, copy_entry
from bitpress.compression.calibration.activation_streams import Streams
from bitpress.compression.calibration.block import compress_block
from bitpress.compression.calibration.block_result import BlockNotes
from bitpress.compression.calibration.layer_groups import Site
from bitpress.compression.data_free import write_shard
from bitpress.compression.resources import Resources
from bitpress.modeling.capture import CapturedInputs, capture_inputs
from bitpress.modeling.decoder import Decoder, DecoderOptions
from bitpress.modeling.hidden_states import HiddenStates
from bitpress.modeling.tokens import CalibrationData
from bitpress.planning import memory_estimate
from bitpress.planning.layout import Shard
from bitpress.planning.plan import Plan
from bitpress.runtime import memory
from bitpress.runtime.cpu_features import has_cpu_feature
from bitpress.runtime.progress import ReportProgress
from bitpress.schemes import pipeline
from bitpress.schemes.activation_quantizer import input_rounding

# instructions for products of bfloat16
BFLOAT16 = ("avx512_bf16", "amx_bf16")


def write_shards(
    plan: Plan,
    output: OutputFolder,
    data: CalibrationData,
    resources: Resources,
    told: ReportProgress,
) -> list[BlockNotes]:
    """Write every shard that an earlier run of the same plan has not written; returns what is to be
    told of each block.

    Each rank runs its part of the batches; all of them compress a block together, and the first
    writes it.

    Args:
        resources: without a limit of memory, half of what is free is taken.

    Raises:
        CheckpointError: transformers cannot build the model, or the model makes numbers that are
            not finite.
    """
    device, process_group = resources.device, resources.process_group
    dtype = _dtype(plan, device)
    notes = []
    with Reader() as reader, torch.no_grad(), memory.retain_freed_memory():
        options = DecoderOptions(device, dtype, resources.trust_remote_code, data.all_experts)
        decoder = Decoder(plan.source, plan.container, reader, options)
        shards = {
            shard.block: shard
            for shard in plan.shards
            if shard.block is not None and shard.block < len(decoder)
        }
        outside = [shard for shard in plan.shards if shard not in shards.values()]
        for shard in process_group.partition_by_size(outside, lambda shard: shard.source_bytes):
            write_shard(shard, output, reader, Resources((device,)), told)

        inputs, streams = _start(plan, decoder, data, output, resources)
        for index in range(len(decoder)):
            calls, inputs.calls[index] = inputs.calls[index], []
            source_block = decoder.load_block(index) if streams.chosen else None
            streams.enter(decoder.load_block(index), source_block, calls)
            if index in shards:
                notes.append(_block(plan, shards[index], output, reader, streams, told))
            drift = streams.leave(last=index + 1 == len(decoder))
            if drift is not None and index in shards:
                notes[-1].blocks[f"{plan.container}.{index}"] = drift
            memory.release_freed_memory(streams.allowed)
    return notes


def _dtype(plan: Plan, device: torch.device) -> torch.dtype:
    """What blocks are computed in: as they will be served, but for CPUs on which float32 is
    faster.
    """
    return (
        plan.dtype
        if device.type != "cpu" or (plan.dtype == torch.bfloat16 and has_cpu_feature(*BFLOAT16))
        else torch.float32
    )


def _start(
    plan: Plan, decoder: Decoder, data: CalibrationData, output: OutputFolder, resources: Resources
) -> tuple[CapturedInputs, Streams]:
    """What every block is called with, and the hidden states before the first of them.

    Those of every eighth batch are there once more where a scheme asks for the source's.
    """
    device, process_group = resources.device, resources.process_group
    batches = memory_estimate.split_batches(data.input_ids, process_group.world_size)
    part = process_group.partition_evenly(batches)
    own = [batches[i] for i in part]

    # what hidden states may take: the interpreter and its libraries stand outside
    if resources.max_memory is None:
        allowed = memory.available_bytes() // (2 * process_group.local_world_size)
    else:
        allowed = resources.max_memory - memory.TRANSFORMERS_BYTES
    need = memory_estimate.estimate_calibration(plan, sum(batch.numel() for batch in own))
    folder = output.folder if need.spilled_bytes(allowed) else None

    inputs = capture_inputs(decoder, own, folder)
    chosen = [
        position
        for position, number in enumerate(part)
        if plan.recipe.needs_reference and number % memory_estimate.REFERENCE_INTERVAL == 0
    ]
    reference = HiddenStates((inputs.hidden_states[i].clone() for i in chosen), folder)
    num_waiting = need.num_waiting(allowed, own[0].numel())
    streams = Streams(
        inputs.hidden_states, reference, chosen, num_waiting, device, process_group, allowed
    )
    return inputs, streams


def _block(
    plan: Plan,
    shard: Shard,
    output: OutputFolder,
    reader: Reader,
    streams: Streams,
    told: ReportProgress,
) -> BlockNotes:
    """Compress one block into its shard, or take up what an earlier run has made of it."""
    prefix, kept = (
        f"{plan.container}.{shard.block}.",
        output.folder / f"{shard.name}{BLOCK_RESULT_SUFFIX}",
    )
    process_group = streams.process_group
    if process_group.broadcast_object(
        process_group.is_rank_zero and output.has_shard(shard.name, shard.header) and kept.is_file()
    ):
        _take_up(shard, prefix, output, reader, streams.block)
        told(shard.source_bytes, f"{shard.name}: finished earlier")
        return BlockNotes(**json.loads(kept.read_text()))
    if not process_group.is_rank_zero:
        return compress_block(
            shard, prefix, streams, lambda name, tensor: None, plan.head_dim, told
        )
    places = {entry.name: entry for entry in shard.header.entries}
    with output.shard(shard.name, shard.header) as writer:
        notes = compress_block(
            shard,
            prefix,
            streams,
            lambda n, t: writer.write(places[n], t.cpu()),
            plan.head_dim,
            told,
        )
        for entry in shard.copies:
            if entry.name in notes.rescaled:
                tensor = streams.block.get_parameter(entry.name.removeprefix(prefix))
                writer.write(places[entry.name], tensor.to(DTYPES[entry.dtype]).cpu())
            else:
                copy_entry(entry, places[entry.name], reader, writer)
            told(entry.nbytes, entry.name)
        output.write_text(kept.name, json.dumps(notes.as_json()))
    return notes


def _take_up(
    shard: Shard, prefix: str, output: OutputFolder, reader: Reader, block: nn.Module
) -> None:
    """Let a block compute with what an earlier run stored of it: its weights, and inputs rounded as
    they will be served.
    """
    stored = {entry.name: entry for entry in read_header(output.folder / shard.name).entries}
    parameters = dict(block.named_parameters(remove_duplicate=False))
    for stack in shard.stacks:
        modules = {
            module: block.get_submodule(module.removeprefix(prefix)) for module in stack.members
        }
        site = Site(stack, modules, None, False)
        for module, weight in site.weights.items():
            names, config = stack.describe_stored(module)
            tensors = {
                name.removeprefix(f"{module}."): reader.whole(stored[name]).to(weight.device)
                for name in names
            }
            weight.copy_(pipeline.dequantize(tensors, config, stack.steps))
            if (rounding := input_rounding(tensors, config, stack.steps)) is not None:
                site.roundings[module] = rounding
        site.round_inputs()
    for entry in shard.copies:
        if (parameter := parameters.get(entry.name.removeprefix(prefix))) is not None:
            parameter.copy_(reader.whole(stored[entry.name]))
