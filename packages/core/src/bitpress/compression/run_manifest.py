"""The manifest and the model card of a run, made from its plan and from what it has written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import attrs

from bitpress.checkpoint import filenames
from bitpress.checkpoint.digests import hash_bytes
from bitpress.checkpoint.hub import read_commit
from bitpress.checkpoint.reader import NAMES
from bitpress.checkpoint.writer import OutputFolder, format_json
from bitpress.compression.calibration.block_result import BlockResult
from bitpress.compression.job import Job, display_name
from bitpress.compression.resources import Resources
from bitpress.output import manifest as manifests, model_card
from bitpress.output.manifest import CacheRecord, FileRecord, LayerRecord, Manifest
from bitpress.planning import loaders
from bitpress.planning.attention_caches import AttentionCache, describe_caches
from bitpress.runtime.version import __version__


def build_manifest(
    job: Job,
    output: OutputFolder,
    block_results: Sequence[BlockResult],
    resources: Resources,
    with_digests: bool,
) -> Manifest:
    """The manifest of a run, without the errors that verification measures.

    Args:
        with_digests: whether to take SHA-256 of the source's files, which is a pass over every
            byte.
    """
    plan = job.plan
    return Manifest(
        __version__,
        plan.recipe.scheme_versions,
        plan.recipe.as_json(),
        display_name(job.model),
        inputs=manifests.describe_files(
            {name: plan.source.folder / name for name in plan.source.headers},
            resources.num_threads,
            with_digests,
            resources.process_group,
        ),
        files=_describe_files(job, output, resources),
        layers=_describe_layers(job, block_results),
        data=describe_calibration(job),
        warnings=job.warnings + tuple(t for result in block_results for t in result.warnings),
        rescaled={
            name: change for result in block_results for name, change in result.rescaled.items()
        },
        blocks={name: error for result in block_results for name, error in result.drift.items()},
        revision=read_commit(plan.source.folder),
        caches={cache.module: _describe_cache(cache) for cache in plan.caches},
    )


def write_model_card(job: Job, manifest: Manifest, output: OutputFolder) -> Manifest:
    """Write the model card; returns the manifest with the card's size and digest."""
    plan = job.plan
    source_card = next(
        (name for name, source in plan.side_files.items() if source == filenames.MODEL_CARD), None
    )
    details = model_card.RunDetails(
        job.command,
        plan.source_bytes,
        plan.output_bytes,
        plan.source.folder,
        source_card,
        job.base_model,
        plan.config,
        loaders.describe_loaders(plan),
        describe_caches(plan.caches) if plan.caches else None,
    )
    content = model_card.render_card(manifest, details)
    output.write_text(filenames.MODEL_CARD, content)
    files = {**manifest.files, filenames.MODEL_CARD: _describe_bytes(content.encode())}
    return attrs.evolve(manifest, files=files)


def _describe_files(
    job: Job, output: OutputFolder, resources: Resources
) -> Mapping[str, FileRecord]:
    """Files that are written already, and config.json, which is written last."""
    written_later = (filenames.CONFIG, filenames.MANIFEST, filenames.MODEL_CARD)
    names = [name for name in job.plan.files if name not in written_later]
    digests = {
        name: digest
        for share in resources.process_group.all_gather_object(output.header_digests)
        for name, digest in share.items()
    }
    # weight files are read when they are verified: until then their headers' digests prove them
    files = manifests.describe_files(
        {name: output.folder / name for name in names if name not in digests},
        resources.num_threads,
        process_group=resources.process_group,
    )
    files |= {
        name: FileRecord((output.folder / name).stat().st_size, header=digest)
        for name, digest in digests.items()
    }
    files[filenames.CONFIG] = _describe_bytes(format_json(job.plan.config).encode())
    return {name: files[name] for name in [*names, filenames.CONFIG]}


def _describe_bytes(content: bytes) -> FileRecord:
    return FileRecord(len(content), hash_bytes(content))


def _describe_layers(job: Job, block_results: Sequence[BlockResult]) -> Mapping[str, LayerRecord]:
    output_errors = {
        name: error for result in block_results for name, error in result.output_errors.items()
    }
    rounding_errors = {
        name: error for result in block_results for name, error in result.rounding_errors.items()
    }
    num_tokens = {
        name: count for result in block_results for name, count in result.num_tokens.items()
    }
    return {
        module: LayerRecord(
            tuple(step.scheme.name for step in stack.steps),
            (entry.shape[0], entry.shape[1]),
            entry.dtype,
            stack.bits(module),
            rounding_error=rounding_errors.get(module),
            output_error=output_errors.get(module),
            tokens=num_tokens.get(module),
        )
        for stack in job.plan.stacks
        for module, entry in stack.members.items()
    }


def _describe_cache(cache: AttentionCache) -> CacheRecord:
    shape = cache.shape
    return CacheRecord(
        shape.num_heads, shape.num_query_heads, shape.channels, str(NAMES[cache.dtype])
    )


def describe_calibration(job: Job) -> dict[str, str] | None:
    """What the run was calibrated on, for people and for who repeats it; None where nothing was."""
    calibration = job.calibration
    if calibration is None:
        return None
    description = {
        "source": calibration.source,
        "tokens": str(calibration.input_ids.numel()),
        "sha256": calibration.digest,
    }
    if calibration.prefix:
        description["prefix"] = calibration.prefix
    if calibration.all_experts:
        description["experts"] = "every token"
    return description
