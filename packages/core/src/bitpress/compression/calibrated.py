"""A calibrated run's weight files: decoder block by decoder block, and in each block layer group by
layer group in forward order.

A layer group is a stack: layers that read one input. Its inputs are observed as the already
compressed groups before it make them, it is compressed, and what a loader will compute with takes
its place; then the next. So every layer is fitted to what it will be given when it is served.
Experts of a block, which wait for none of each other, are compressed several at a time. At least
every eighth batch is run through the source's weights as well, for schemes that ask how far the
inputs have drifted. A head that is fitted to data comes last.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from attrs import evolve, frozen
from torch import nn

from bitpress.checkpoint.reader import Reader
from bitpress.checkpoint.safetensors import read_header
from bitpress.checkpoint.writer import OutputFolder
from bitpress.compression.calibration import fold
from bitpress.compression.calibration.activation_streams import (
    ActivationStreams,
    ReferenceStates,
    StreamLimits,
)
from bitpress.compression.calibration.block import WriteTensor, compress_block
from bitpress.compression.calibration.block_result import BlockResult
from bitpress.compression.calibration.fitted_shards import Compress, FittedShards
from bitpress.compression.calibration.gradient_sample import GradientSample
from bitpress.compression.calibration.head import compress_head
from bitpress.compression.calibration.layer_groups import BlockPlan, LayerGroup
from bitpress.compression.calibration.rank_share import Budget, OwnBatches, Thrift
from bitpress.compression.calibration.solution import install
from bitpress.compression.data_free import write_shard
from bitpress.compression.resources import Resources
from bitpress.modeling.attention import watched_attention
from bitpress.modeling.capture import CapturedInputs, capture_inputs
from bitpress.modeling.decoder import Decoder, DecoderOptions
from bitpress.modeling.tokens import CalibrationData
from bitpress.planning import memory_estimate
from bitpress.planning.layout import Shard
from bitpress.planning.plan import Plan
from bitpress.runtime import devices, memory
from bitpress.runtime.cpu_features import has_cpu_feature
from bitpress.runtime.lanes import Lanes
from bitpress.runtime.logger import logger, warn
from bitpress.runtime.progress import (
    FINISHED_EARLIER,
    RepeatableWork,
    ReportProgress,
    copy_work,
    in_block,
)
from bitpress.schemes.values import StoredLayer

# Instruction sets that multiply bfloat16; without one, torch computes it slower than float32.
BFLOAT16_FEATURES = ("avx512_bf16", "amx_bf16")


@frozen(eq=False)
class _Run:
    """What every block of a run is compressed with."""

    plan: Plan
    output: OutputFolder
    reader: Reader
    resources: Resources
    report_progress: ReportProgress
    fitted_shards: FittedShards

    @property
    def dtype(self) -> torch.dtype:
        """What blocks are computed in: as they will be served, but for CPUs on which float32 is
        faster.
        """
        is_cpu = self.resources.device.type == "cpu"
        is_fast_bfloat16 = self.plan.dtype == torch.bfloat16 and has_cpu_feature(*BFLOAT16_FEATURES)
        return torch.float32 if is_cpu and not is_fast_bfloat16 else self.plan.dtype


def write_shards(
    plan: Plan,
    output: OutputFolder,
    calibration: CalibrationData,
    resources: Resources,
    report_progress: ReportProgress,
) -> list[BlockResult]:
    """Write every shard that an earlier run of the same plan has not written; returns what was
    measured of each block.

    Each rank runs its part of the batches; all of them compress a block together, and rank 0 writes
    it. A run that runs out of a GPU's memory goes on from its last finished block, with less kept
    there, then with smaller batches, at last with layers that are brought one by one; of several
    ranks all do, where they agree that one of them has run out.

    Args:
        resources: without a limit of memory, half of what is available is used.

    Raises:
        CheckpointError: transformers cannot build the model, or the model makes numbers that are
            not finite.
    """
    thrift, work = Thrift(memory_estimate.BATCH_TOKENS), RepeatableWork(report_progress)
    while True:
        try:
            with watched_attention():
                return _write_blocks(plan, output, calibration, resources, _Attempt(thrift, work))
        except RuntimeError as e:
            more = thrift.after(e, calibration.input_ids, resources.process_group)
            if more is None:
                raise
        # outside the handler: the error holds what the block has held
        thrift = more
        if resources.process_group.is_rank_zero:
            name = resources.device if resources.process_group.world_size == 1 else "a rank's GPU"
            warn(f"{name} has run out of memory: the block is begun again, with {thrift}", 2)
        work.begin_again()
        devices.release_memory(resources.device)


@frozen(eq=False)
class _Attempt:
    """How sparing a run is by now, and what it reports to."""

    thrift: Thrift
    report_progress: ReportProgress


def _write_blocks(
    plan: Plan,
    output: OutputFolder,
    calibration: CalibrationData,
    resources: Resources,
    attempt: _Attempt,
) -> list[BlockResult]:
    """Write every shard that is not there, in as much memory as an attempt may take."""
    results = []
    report_progress = attempt.report_progress
    own_batches, budget = _plan_batches(plan, calibration, resources, attempt.thrift)
    with (
        Reader(pinned=resources.device.type != "cpu") as reader,
        torch.no_grad(),
        memory.retain_freed_memory(budget.is_ample),
        Lanes(budget.num_lanes) as lanes,
        FittedShards(output, resources) as fitted_shards,
    ):
        logger.debug("%d forward passes run side by side", budget.num_lanes)
        run = _Run(plan, output, reader, resources, report_progress, fitted_shards)
        report_progress(0, "building the model")
        decoder = _build_decoder(run, calibration.all_experts, budget.max_brought_bytes)
        block_shards = _select_block_shards(plan, decoder)
        heads = [shard for shard in plan.shards if shard.has_fitted_head]
        _write_other_shards(run, [*block_shards.values(), *heads])

        report_progress(0, "running the embeddings")
        with resources.process_group.agreeing():
            inputs, streams = _capture_inputs(run, decoder, own_batches, budget, lanes)
        # embeddings take more than a block does
        memory.release_freed_memory(budget.max_working_bytes)
        gradients = GradientSample(plan, decoder, own_batches, inputs, streams)
        for index in range(len(decoder)):
            block_run = evolve(run, report_progress=in_block(report_progress, index, len(decoder)))
            block_run.report_progress(0, "loading")
            with resources.process_group.agreeing():
                _enter_block(index, decoder, streams, inputs)
            if index in block_shards:
                shard = block_shards[index]
                results.append(_compress_or_resume_block(block_run, shard, streams, gradients))
            # a block's calls are dropped with the block
            inputs.calls[index] = []
            block_run.report_progress(0, "running")
            drift = streams.leave_block(is_last=index + 1 == len(decoder) and not heads)
            if drift is not None and index in block_shards:
                results[-1] = evolve(results[-1], drift={f"{plan.container}.{index}": drift})
            memory.release_freed_memory(streams.limits.max_working_bytes)
            gigabytes = memory.resident_bytes() / 1e9
            logger.debug("block %d/%d: %.2f GB in memory", index + 1, len(decoder), gigabytes)
        results += [_compress_or_resume_head(run, h, decoder, streams, inputs) for h in heads]
    return _with_warnings(results, gradients.warnings)


def _enter_block(
    index: int, decoder: Decoder, streams: ActivationStreams, inputs: CapturedInputs
) -> None:
    block = decoder.load_block(index)
    source_block = None if streams.reference is None else decoder.copy_block(index, block)
    streams.enter_block(block, source_block, inputs.calls[index])


def _plan_batches(
    plan: Plan, calibration: CalibrationData, resources: Resources, thrift: Thrift
) -> tuple[OwnBatches, Budget]:
    """The batches of this rank, and the memory that it may take for them."""
    own_batches = OwnBatches.of_rank(
        plan, calibration.input_ids, resources.process_group, thrift.batch_tokens
    )
    budget = Budget.for_run(plan, own_batches, resources, thrift)
    num_experts = min(resources.process_group.all_gather_object(budget.num_experts))
    return own_batches, evolve(budget, num_experts=num_experts)


def _with_warnings(results: list[BlockResult], warnings: Sequence[str]) -> list[BlockResult]:
    """The last block's result with warnings that are of all blocks."""
    if not results:
        return results
    *others, last = results
    return [*others, evolve(last, warnings=[*last.warnings, *warnings])]


def _build_decoder(run: _Run, all_experts: bool, brought_bytes: int | None) -> Decoder:
    device, trusts_code = run.resources.device, run.resources.trust_remote_code
    options = DecoderOptions(device, run.dtype, trusts_code, all_experts, brought_bytes)
    return Decoder(run.plan.source, run.plan.container, run.reader, options)


def _select_block_shards(plan: Plan, decoder: Decoder) -> dict[int, Shard]:
    """By number of the block, the shards that are compressed as a decoder block."""
    return {
        shard.block: shard
        for shard in plan.shards
        if shard.block is not None and shard.block < len(decoder)
    }


def _write_other_shards(run: _Run, fitted: Sequence[Shard]) -> None:
    """Write this rank's part of the shards that nothing is fitted in."""
    process_group, device = run.resources.process_group, run.resources.device
    shards = [shard for shard in run.plan.shards if shard not in fitted]
    for shard in process_group.partition_by_size(shards, lambda shard: shard.source_bytes):
        write_shard(
            shard,
            run.output,
            run.reader,
            Resources((device,), is_proved=run.resources.is_proved),
            # it takes next to no time beside the blocks, which the stage is counted in
            run.report_progress
            if shard.block is not None
            else lambda num_bytes, text="": run.report_progress(0, text),
        )


def _capture_inputs(
    run: _Run, decoder: Decoder, own_batches: OwnBatches, budget: Budget, lanes: Lanes
) -> tuple[CapturedInputs, ActivationStreams]:
    """What every block is called with, and the streams before the first block."""
    folder = run.output.folder if budget.is_spilled else None
    inputs = capture_inputs(decoder, own_batches.batches, folder, budget.states_device)
    reference_batches = [
        position
        for position, number in enumerate(own_batches.numbers)
        if run.plan.needs_reference and number % own_batches.reference_interval == 0
    ]
    reference = None
    if reference_batches:
        states = inputs.hidden_states.kept_alike(
            inputs.hidden_states[i].clone() for i in reference_batches
        )
        reference = ReferenceStates(states, reference_batches)
    limits = StreamLimits(budget.max_resumable, budget.max_working_bytes, lanes, budget.num_experts)
    streams = ActivationStreams(
        inputs.hidden_states, run.resources.device, limits, reference, run.resources.process_group
    )
    return inputs, streams


def _compress_or_resume_block(
    run: _Run, shard: Shard, streams: ActivationStreams, gradients: GradientSample
) -> BlockResult:
    """Compress one block into its shard, or install what an earlier run has stored of it."""
    plan = run.plan
    prefix = f"{plan.container}.{shard.block}."
    result = run.fitted_shards.read_finished(shard)
    if result is not None:
        _install_finished_block(run, shard, prefix, streams.block)
        if streams.source_block is not None:
            # as the earlier run did: later blocks are given the same numbers
            fold.fold_into(streams.source_block, fold.read_rescalings(result.rescaled, prefix))
        run.report_progress(shard.work_bytes, FINISHED_EARLIER)
        return result

    assert shard.block is not None
    with streams.process_group.agreeing():
        gradients_by_stack = gradients.of_block(shard.block, shard.stacks, run.report_progress)
    block_plan = BlockPlan.of_shard(plan, shard, run.reader, gradients_by_stack)

    def compress(write_tensor: WriteTensor) -> BlockResult:
        return compress_block(block_plan, streams, write_tensor, run.report_progress)

    return _write_fitted(run, shard, compress)


def _compress_or_resume_head(
    run: _Run,
    shard: Shard,
    decoder: Decoder,
    streams: ActivationStreams,
    inputs: CapturedInputs,
) -> BlockResult:
    """Fit the head into its shard, unless an earlier run has."""
    finished = run.fitted_shards.read_finished(shard)
    if finished is not None:
        run.report_progress(shard.work_bytes, FINISHED_EARLIER)
        return finished

    (stack,) = shard.stacks
    run.report_progress(0, f"{stack.name} · fitting")

    def compress(write_tensor: WriteTensor) -> BlockResult:
        return compress_head(stack, streams, decoder, inputs.extra_outputs, write_tensor)

    result = _write_fitted(run, shard, compress)
    run.report_progress(stack.source_bytes, f"{stack.name} · done")
    return result


def _write_fitted(run: _Run, shard: Shard, compress: Compress) -> BlockResult:
    result = run.fitted_shards.write(shard, compress)
    run.report_progress(sum(copy_work(entry.nbytes) for entry in shard.copies), "copying")
    return result


def _install_finished_block(run: _Run, shard: Shard, prefix: str, block: nn.Module) -> None:
    """Let a block compute with what an earlier run has stored of it: its weights, and inputs
    quantized as they will be served.
    """
    header = read_header(run.output.folder / shard.name)
    entries = {entry.name: entry for entry in header.entries}
    for stack in shard.stacks:
        group = LayerGroup.in_block(stack, block, prefix)
        stored_layers = []
        for name, weight in group.weights.items():
            planned, config = stack.describe_stored(name)
            tensors = {
                suffix: run.reader.whole(entries[f"{name}.{suffix}"]).to(weight.device)
                for suffix in planned
            }
            stored_layers.append(StoredLayer(tensors, config))
        install(stored_layers, group)
        group.register_input_quantizers()

    # norms and biases, into which scales may have been folded
    parameters = dict(block.named_parameters(remove_duplicate=False))
    for entry in shard.copies:
        parameter = parameters.get(entry.name.removeprefix(prefix))
        if parameter is not None:
            parameter.copy_(run.reader.whole(entries[entry.name]))
