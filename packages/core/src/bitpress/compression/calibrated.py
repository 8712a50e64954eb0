"""A calibrated run's weight files: decoder block by decoder block, and in each block layer group by
layer group in forward order.

A layer group is a stack: layers that read one input. Its inputs are observed as the already
compressed groups before it make them, it is compressed, and what a loader will compute with takes
its place; then the next. So every layer is fitted to what it will be given when it is served. Every
eighth batch is run through the source's weights as well, for schemes that ask how far the inputs
have drifted.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch
from attrs import evolve, frozen
from torch import Tensor, nn

from bitpress.checkpoint.filenames import BLOCK_RESULT_SUFFIX
from bitpress.checkpoint.reader import Reader
from bitpress.checkpoint.safetensors import read_header
from bitpress.checkpoint.signed_json import is_signed, sign_json
from bitpress.checkpoint.writer import OutputFolder, copy_entry
from bitpress.compression.calibration import fold
from bitpress.compression.calibration.activation_streams import (
    ActivationStreams,
    ReferenceStates,
    StreamLimits,
)
from bitpress.compression.calibration.block import compress_block
from bitpress.compression.calibration.block_result import BlockResult
from bitpress.compression.calibration.layer_groups import BlockPlan, GradientsByStack, LayerGroup
from bitpress.compression.calibration.output_gradients import (
    GradientSource,
    GradientStatistics,
    SampleBatches,
    observe_gradients,
)
from bitpress.compression.calibration.rank_share import Budget, OwnBatches, Thrift
from bitpress.compression.calibration.solution import install
from bitpress.compression.data_free import write_shard
from bitpress.compression.resources import Resources
from bitpress.errors import first_line, is_out_of_memory
from bitpress.modeling.attention import watched_attention
from bitpress.modeling.capture import CapturedInputs, capture_inputs
from bitpress.modeling.decoder import Decoder, DecoderOptions
from bitpress.modeling.tokens import CalibrationData
from bitpress.output.rescaling import rescale
from bitpress.planning import memory_estimate
from bitpress.planning.layout import Shard, Stack
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
    ):
        logger.debug("%d forward passes run side by side", budget.num_lanes)
        run = _Run(plan, output, reader, resources, report_progress)
        report_progress(0, "building the model")
        trusts_code, all_experts = resources.trust_remote_code, calibration.all_experts
        device, brought_bytes = resources.device, budget.max_brought_bytes
        options = DecoderOptions(device, run.dtype, trusts_code, all_experts, brought_bytes)
        decoder = Decoder(plan.source, plan.container, reader, options)
        block_shards = _select_block_shards(plan, decoder)
        _write_other_shards(run, [s for s in plan.shards if s not in block_shards.values()])

        report_progress(0, "running the embeddings")
        with resources.process_group.agreeing():
            inputs, streams = _capture_inputs(run, decoder, own_batches, budget, lanes)
        # embeddings take more than a block does
        memory.release_freed_memory(budget.max_working_bytes)
        gradients = _Gradients(run, decoder, own_batches, inputs, streams)
        for index in range(len(decoder)):
            block_run = evolve(run, report_progress=in_block(report_progress, index, len(decoder)))
            block_run.report_progress(0, "loading")
            with resources.process_group.agreeing():
                source_block = decoder.load_block(index) if streams.reference is not None else None
                streams.enter_block(decoder.load_block(index), source_block, inputs.calls[index])
            if index in block_shards:
                shard = block_shards[index]
                results.append(_compress_or_resume_block(block_run, shard, streams, gradients))
            # a block's calls are dropped with the block
            inputs.calls[index] = []
            block_run.report_progress(0, "running")
            drift = streams.leave_block(is_last=index + 1 == len(decoder))
            if drift is not None and index in block_shards:
                results[-1] = evolve(results[-1], drift={f"{plan.container}.{index}": drift})
            memory.release_freed_memory(streams.limits.max_working_bytes)
            _log_block(index, len(decoder))
    return _with_warnings(results, gradients.warnings)


def _plan_batches(
    plan: Plan, calibration: CalibrationData, resources: Resources, thrift: Thrift
) -> tuple[OwnBatches, Budget]:
    """The batches of this rank, and the memory that it may take for them."""
    own_batches = OwnBatches.of_rank(
        plan, calibration.input_ids, resources.process_group, thrift.batch_tokens
    )
    return own_batches, Budget.for_run(plan, own_batches, resources, thrift)


def _with_warnings(results: list[BlockResult], warnings: Sequence[str]) -> list[BlockResult]:
    """The last block's result with warnings that are of all blocks."""
    if not results:
        return results
    *others, last = results
    return [*others, evolve(last, warnings=[*last.warnings, *warnings])]


def _select_block_shards(plan: Plan, decoder: Decoder) -> dict[int, Shard]:
    """By number of the block, the shards that are compressed as a decoder block."""
    return {
        shard.block: shard
        for shard in plan.shards
        if shard.block is not None and shard.block < len(decoder)
    }


def _log_block(index: int, num_blocks: int) -> None:
    resident_bytes = memory.resident_bytes()
    logger.debug("block %d/%d: %.2f GB in memory", index + 1, num_blocks, resident_bytes / 1e9)


def _write_other_shards(run: _Run, shards: list[Shard]) -> None:
    """Write this rank's part of the shards that lie outside the blocks."""
    process_group, device = run.resources.process_group, run.resources.device
    for shard in process_group.partition_by_size(shards, lambda shard: shard.source_bytes):
        write_shard(
            shard,
            run.output,
            run.reader,
            Resources((device,), is_proved=run.resources.is_proved),
            # it takes next to no time beside the blocks, which the stage is counted in
            run.report_progress if shard.block is not None else _report_text(run.report_progress),
        )


def _report_text(report_progress: ReportProgress) -> ReportProgress:
    return lambda num_bytes, text="": report_progress(0, text)


def _capture_inputs(
    run: _Run,
    decoder: Decoder,
    own_batches: OwnBatches,
    budget: Budget,
    lanes: Lanes,
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
    limits = StreamLimits(budget.max_resumable, budget.max_working_bytes, lanes)
    streams = ActivationStreams(
        inputs.hidden_states, run.resources.device, limits, reference, run.resources.process_group
    )
    return inputs, streams


class _Gradients:
    """What is observed of gradients: taken when the first block is compressed that no earlier run
    has finished, of that block and all after it.
    """

    def __init__(
        self,
        run: _Run,
        decoder: Decoder,
        own_batches: OwnBatches,
        inputs: CapturedInputs,
        streams: ActivationStreams,
    ) -> None:
        self._run, self._decoder, self._own_batches = run, decoder, own_batches
        self._inputs, self._streams = inputs, streams
        self._statistics: GradientStatistics | None = None
        self.warnings: list[str] = []

    def of_block(self, index: int, stacks: Sequence[Stack]) -> GradientsByStack:
        """By stack, the statistics of every step; empty where none takes any."""
        if self._streams.reference is None or not self._run.plan.needs_gradients:
            return {}
        if self._statistics is None:
            try:
                self._statistics = self._observe(index, self._streams.reference)
            except (RuntimeError, NotImplementedError) as e:
                if is_out_of_memory(e):
                    raise
                self._statistics = GradientStatistics()
                self.warnings.append(
                    f"the model cannot be run backward ({first_line(e)}): rows do not make up for "
                    "each other's errors"
                )
        return {stack.name: self._statistics.of_stack(stack.name) for stack in stacks}

    def _observe(self, first_block: int, reference: ReferenceStates) -> GradientStatistics:
        self._run.report_progress(0, "running the source backward")
        plan, own = self._run.plan, self._own_batches
        interval = own.reference_interval
        batch_tokens = own.batches[0].numel()
        positions = [
            i
            for i, batch in enumerate(reference.batches)
            if memory_estimate.is_gradient_batch(plan, own.numbers[batch], interval, batch_tokens)
        ]
        batches = [reference.batches[i] for i in positions]
        sample = SampleBatches(
            reference.states.kept_alike(reference.states[i] for i in positions),
            [[calls[batch] for batch in batches] if calls else [] for calls in self._inputs.calls],
            [own.numbers[batch] for batch in batches],
        )
        stacks = {shard.block: shard.stacks for shard in plan.shards if shard.block is not None}
        source = GradientSource(self._decoder, stacks, plan.container, self._streams.limits.lanes)
        return observe_gradients(source, sample, first_block)


def _compress_or_resume_block(
    run: _Run, shard: Shard, streams: ActivationStreams, gradients: _Gradients
) -> BlockResult:
    """Compress one block into its shard, or install what an earlier run has stored of it."""
    plan, output, process_group = run.plan, run.output, streams.process_group
    prefix = f"{plan.container}.{shard.block}."
    result_file = output.folder / f"{shard.name}{BLOCK_RESULT_SUFFIX}"

    # rank 0 looks, since another host may see a file later
    is_finished = (
        process_group.is_rank_zero
        and output.has_shard(shard.name, shard.header, run.resources.num_threads)
        and result_file.is_file()
        and is_signed(result_file.read_bytes())
    )
    if process_group.broadcast_object(is_finished):
        result = BlockResult.from_json(json.loads(result_file.read_text()))
        _install_finished_block(run, shard, prefix, streams.block)
        if streams.source_block is not None:
            # as the earlier run did: later blocks are given the same numbers
            fold.fold_into(streams.source_block, fold.read_rescalings(result.rescaled, prefix))
        run.report_progress(shard.work_bytes, FINISHED_EARLIER)
        return result

    assert shard.block is not None
    with process_group.agreeing():
        gradients_by_stack = gradients.of_block(shard.block, shard.stacks)
    block_plan = BlockPlan.of_shard(plan, shard, run.reader, gradients_by_stack)
    if not process_group.is_rank_zero:
        return compress_block(block_plan, streams, lambda name, tensor: None, run.report_progress)

    entries = {entry.name: entry for entry in shard.header.entries}
    with output.shard(shard.name, shard.header) as writer:

        def write_tensor(name: str, tensor: Tensor) -> None:
            writer.write(entries[name], tensor.cpu())

        result = compress_block(block_plan, streams, write_tensor, run.report_progress)
        for entry in shard.copies:
            if entry.name in result.rescaled:
                source = run.reader.whole(entry)
                write_tensor(entry.name, rescale(source, result.rescaled[entry.name]))
            else:
                copy_entry(entry, entries[entry.name], run.reader, writer)
            run.report_progress(copy_work(entry.nbytes), "copying")
        # before the shard has its name: a finished shard has its result beside it
        output.write_text(result_file.name, sign_json(result.as_json()))
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
