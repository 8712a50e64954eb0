"""A run, from a job to a folder that loaders take for a model."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import attrs
import torch
from attrs import field, frozen

from bitpress.checkpoint import filenames
from bitpress.checkpoint.filenames import INDEX
from bitpress.checkpoint.reader import open_checkpoint
from bitpress.checkpoint.writer import OutputFolder, Permissions, format_json
from bitpress.compression import accuracy_check, calibrated, data_free, resume
from bitpress.compression.accuracy_check import AccuracyCheck
from bitpress.compression.calibration.block_result import BlockResult
from bitpress.compression.finished_run import read_finished
from bitpress.compression.job import Job
from bitpress.compression.resources import Resources
from bitpress.compression.run_manifest import build_manifest, write_model_card
from bitpress.errors import OutputError, RecipeError, VerificationError
from bitpress.output import manifest as manifests, verify as verification
from bitpress.output.file_proof import Workers, verify_files
from bitpress.output.layer_proof import LayerMeasurement
from bitpress.output.manifest import Manifest
from bitpress.output.written_model import WrittenModel
from bitpress.planning.memory_estimate import estimate_device, estimate_disk, estimate_memory
from bitpress.planning.plan import Plan
from bitpress.planning.run_options import RunOptions
from bitpress.runtime import memory
from bitpress.runtime.devices import (
    count_cores,
    find_all_devices,
    require_memory,
    resolve_name,
    torch_threads,
)
from bitpress.runtime.logger import log_warnings, logger, warn
from bitpress.runtime.process_group import SINGLE_PROCESS, ProcessGroup
from bitpress.runtime.progress import Progress, ignore_progress
from bitpress.runtime.version import __version__


def run(
    job: Job,
    out: str | Path,
    options: RunOptions | None = None,
    progress: Progress = ignore_progress,
    process_group: ProcessGroup = SINGLE_PROCESS,
) -> Manifest:
    """Write a job's model into the folder `out`, on this rank; all ranks return the same.

    Raises:
        BitpressError: the options, the folder or a file of the source cannot be used.
        VerificationError: the written files are not what was planned, or predict too badly.
    """
    options = options or RunOptions()
    if job.calibration is not None:
        job = job.with_calibration(resume.read_begun_tokens(Path(out), job.calibration))
    plan = job.plan
    resources = _choose_resources(job, options, process_group)
    _check_options(job, options, resources)
    _log_resources(resources)

    if (finished := _read_finished(job, Path(out), options, resources)) is not None:
        return finished
    if process_group.is_rank_zero:
        log_warnings(job.warnings)
    permissions = Permissions.of(plan.source.folder, plan.source.headers)
    with OutputFolder(Path(out), permissions) as output:
        check = _prepare_output(job, output, resources)
        stamps = resume.read_stamps(plan.source)

        with _keep_record(job, output, resources):
            resume.require_same_on_ranks(process_group, plan, job.calibration, resources.device)
            _require_shared_folder(output, process_group)
            written = _write_shards(job, output, resources, progress)
            # a changed source's faults would otherwise seem to be the output's
            resume.check_unchanged(plan.source, stamps)
            _copy_side_files(plan, output, process_group)
            process_group.barrier()

            manifest = build_manifest(job, output, written.block_results, resources, options.verify)
            if options.verify:
                workers = _start_verifying(manifest, plan, written, resources, progress)
                manifest = _verify(manifest, plan, output, written.measured, workers)
            if check and process_group.is_rank_zero:
                manifest = _check_accuracy(manifest, check, output, resources, progress)
                assert manifest.check is not None
                accuracy_check.require_accuracy(manifest.check, options.max_kl, output.folder)

            resume.check_unchanged(plan.source, stamps)
            if process_group.is_rank_zero:
                manifest = _publish(job, manifest, output)
        return process_group.broadcast_object(manifest)


def _read_finished(
    job: Job, out: Path, options: RunOptions, resources: Resources
) -> Manifest | None:
    """The manifest of an output that this job has finished already, on all ranks."""
    finished = None
    if resources.process_group.is_rank_zero:
        finished = read_finished(job, out, options, resources.num_threads)
        if finished is not None:
            warn(f"{out} is finished already: the same run wrote it", stacklevel=3)
    return resources.process_group.broadcast_object(finished)


def _require_shared_folder(output: OutputFolder, process_group: ProcessGroup) -> None:
    if not output.is_locked:
        raise OutputError(
            f"rank {process_group.rank} does not see {output.folder} as rank 0 has prepared it: "
            "all need one file system"
        )


def _choose_resources(job: Job, options: RunOptions, process_group: ProcessGroup) -> Resources:
    devices = find_all_devices(process_group.local_device(resolve_name(options.device)))
    num_threads = options.num_threads or _choose_num_threads(job, options.max_memory, process_group)
    return Resources(
        devices,
        num_threads,
        options.max_memory,
        options.max_device_memory,
        options.trust_remote_code,
        process_group,
        options.verify,
    )


def _log_resources(resources: Resources) -> None:
    """What computes, for whoever looks for a fault."""
    devices = ", ".join(map(str, resources.devices))
    available = memory.available_bytes() / 1e9
    limit = resources.max_memory
    logger.debug("bitpress %s, torch %s, on %s", __version__, torch.__version__, devices)
    logger.debug("%d threads on %d cores", resources.num_threads, count_cores())
    logger.debug(
        "%.2f GB of memory available, %s",
        available,
        "no limit" if limit is None else f"limit {limit / 1e9:.2f} GB",
    )


def _choose_num_threads(
    job: Job, max_memory: int | None, process_group: ProcessGroup = SINGLE_PROCESS
) -> int:
    """As many as there are cores for a rank, or fewer where memory is short and each thread takes
    its own.
    """
    max_threads = max(count_cores() // process_group.local_world_size, 1)
    if job.calibration:
        return max_threads
    if max_memory is None:
        max_memory = memory.attainable_bytes(process_group.local_world_size)
    for num_threads in range(max_threads, 1, -1):
        if estimate_memory(job.plan, num_threads) <= max_memory:
            return num_threads
    return 1


def _check_options(job: Job, options: RunOptions, resources: Resources) -> None:
    """Raise RecipeError where a limit cannot be kept; warn where memory is likely to run out."""
    max_memory, max_kl = options.max_memory, options.max_kl
    min_memory = estimate_memory(job.plan, resources.num_threads, job.calibration_shape)
    hint = "" if job.calibration else "; fewer threads need less"
    if max_memory is not None and max_memory < min_memory:
        raise RecipeError(memory.describe_shortage("the run", min_memory, max_memory) + hint)
    attainable_bytes = memory.attainable_bytes(resources.process_group.local_world_size)
    if attainable_bytes < min_memory:
        warn(
            f"the run needs about {min_memory / 1e6:,.0f} MB of memory, and this machine or its "
            f"container gives it {attainable_bytes / 1e6:,.0f} MB: the system may end it",
            stacklevel=3,
        )
    _check_device_memory(job, options, resources)
    # `not >=` and not `<`: NaN is no limit
    if max_kl is not None and (job.check_text is None or not max_kl >= 0):
        raise RecipeError(
            f"--max-kl {max_kl}: it is a number from 0 on, and needs a text to measure it on: "
            "--check FILE"
        )


def _check_device_memory(job: Job, options: RunOptions, resources: Resources) -> None:
    """Raise RecipeError where a GPU may not give what a calibrated run needs at least; warn where
    it has not as much.
    """
    limit = options.max_device_memory
    if resources.device.type == "cpu":
        if limit is not None:
            raise RecipeError(
                "--max-device-memory: --device cpu has no memory of its own; give --device cuda, "
                "or --max-memory"
            )
        return
    if job.calibration_shape is None:
        return
    _, length = job.calibration_shape
    num_bytes = estimate_device(job.plan, length, length, by_layer=True).on_disk
    require_memory(resources.device, num_bytes, limit)


def _prepare_output(job: Job, output: OutputFolder, resources: Resources) -> AccuracyCheck | None:
    """Lock the folder and see that there is room for all files; returns the check of the result."""
    plan, process_group = job.plan, resources.process_group
    if output.folder.resolve().is_relative_to(plan.source.folder.resolve()):
        raise OutputError(f"{output.folder} is the source or lies inside it; name another folder")
    check = None
    if job.check_text:
        check = accuracy_check.prepare_check(plan, job.check_text, resources, output.folder)
    if process_group.is_rank_zero:
        num_bytes = estimate_disk(
            plan, job.calibration_shape, resources.max_memory, process_group.world_size
        )
        output.prepare([*plan.files, *_block_result_files(plan)], num_bytes)
    return check


def _keep_record(
    job: Job, output: OutputFolder, resources: Resources
) -> contextlib.AbstractContextManager[None]:
    """The record by which a later run knows whether it may resume this one, kept by rank 0."""
    if not resources.process_group.is_rank_zero:
        return contextlib.nullcontext()
    return resume.keep_record(output, job.plan, job.calibration, resources.device)


@frozen(eq=False)
class _WrittenShards:
    """What was measured while shards were written.

    Attributes:
        measured: by layer, in a run without calibration.
        block_results: of each block, in a calibrated one.
    """

    measured: Mapping[str, LayerMeasurement] = field(factory=dict)
    block_results: Sequence[BlockResult] = ()


def _write_shards(
    job: Job, output: OutputFolder, resources: Resources, progress: Progress
) -> _WrittenShards:
    plan = job.plan
    if job.calibration:
        fitted = (s for s in plan.shards if s.block is not None or s.has_fitted_head)
        report_progress = progress("compressing", sum(shard.work_bytes for shard in fitted))
        # on a CPU batches run side by side, each on one core; what torch computes with several
        # threads would depend on how many there are
        is_cpu = resources.device.type == "cpu"
        with torch_threads(1 if is_cpu else resources.num_threads):
            results = calibrated.write_shards(
                plan, output, job.calibration, resources, report_progress
            )
        return _WrittenShards(block_results=results)

    shards = data_free.select_shards(plan, resources.process_group)
    report_progress = progress("compressing", sum(shard.work_bytes for shard in shards))
    # tasks run side by side, each on one core: torch's own threads would only wait for each other
    with torch_threads(1):
        measured = data_free.write_shards(plan, output, resources, report_progress)
    return _WrittenShards(measured)


def _copy_side_files(plan: Plan, output: OutputFolder, process_group: ProcessGroup) -> None:
    """Tokenizer, generation config and the like, and the index of the shards."""
    if not process_group.is_rank_zero:
        return
    for name, source_name in plan.side_files.items():
        output.copy_file(name, plan.source.folder / source_name)
    if plan.index:
        output.write_text(INDEX, format_json(plan.index))


def _start_verifying(
    manifest: Manifest,
    plan: Plan,
    written: _WrittenShards,
    resources: Resources,
    progress: Progress,
) -> Workers:
    """Who reads every file back, and then the layers that were not measured in memory."""
    num_bytes = plan.output_bytes + sum(
        layer.stored_bytes
        for module, layer in manifest.layers.items()
        if module not in written.measured
    )
    process_group = resources.process_group
    report_progress = progress("verifying", num_bytes // process_group.world_size)
    return Workers(resources.num_threads, report_progress, process_group, resources.devices)


def _verify(
    manifest: Manifest,
    plan: Plan,
    output: OutputFolder,
    measured: Mapping[str, LayerMeasurement],
    workers: Workers,
) -> Manifest:
    """The manifest with the digest of every file and the error of every layer; raises
    VerificationError where what is read back is not what was written, or something else is wrong.

    Args:
        measured: of layers before they were written, on this rank.
    """
    shares = workers.process_group.all_gather_object(measured)
    measured = {module: layer for share in shares for module, layer in share.items()}
    # config.json is written last
    written = {name: record for name, record in manifest.files.items() if name != filenames.CONFIG}
    with torch_threads(1):
        files, faults = verify_files(written, output.folder, workers)
        if not faults:
            opened = _open_written(manifest, plan, output)
            report = verification.verify_tensors(opened, plan.source, workers, measured)
            faults += report.faults
    if faults:
        raise VerificationError(
            f"{output.folder}: the written files are not what was planned; delete the folder",
            faults,
        )
    layers = {
        module: attrs.evolve(layer, error=report.errors[module])
        for module, layer in manifest.layers.items()
    }
    return attrs.evolve(manifest, layers=layers, files={**manifest.files, **files})


def _check_accuracy(
    manifest: Manifest,
    check: AccuracyCheck,
    output: OutputFolder,
    resources: Resources,
    progress: Progress,
) -> Manifest:
    """The manifest with how far the result's predictions are from its source's."""
    written = _open_written(manifest, check.plan, output)
    with torch_threads(resources.num_threads):
        return attrs.evolve(manifest, check=check.measure(written, resources, progress))


def _open_written(manifest: Manifest, plan: Plan, output: OutputFolder) -> WrittenModel:
    """What was written, which has no config.json yet."""
    checkpoint = open_checkpoint(output.folder, config=plan.config)
    return WrittenModel(checkpoint, plan.recipe, manifest.layers, manifest.rescaled, plan.caches)


def _publish(job: Job, manifest: Manifest, output: OutputFolder) -> Manifest:
    """Write what describes the model; config.json last, since without it no loader takes the folder
    for a model.
    """
    log_warnings(manifest.warnings[len(job.warnings) :])
    manifest = write_model_card(job, manifest, output)
    output.write_text(filenames.MANIFEST, manifests.serialize(manifest))
    output.write_text(filenames.CONFIG, format_json(job.plan.config))
    output.remove(_block_result_files(job.plan))
    logger.info("%s: written", output.folder)
    return manifest


def _block_result_files(plan: Plan) -> list[str]:
    """Files beside the shards of blocks, from which a calibrated run resumes."""
    return [shard.name + filenames.BLOCK_RESULT_SUFFIX for shard in plan.shards]
