"""A job that is started again when it has finished: its output is recognized, and left as it is."""

from __future__ import annotations

from pathlib import Path

from bitpress.checkpoint import filenames
from bitpress.checkpoint.digests import hash_bytes, hash_file
from bitpress.checkpoint.safetensors import read_header
from bitpress.checkpoint.writer import format_json
from bitpress.compression.job import Job
from bitpress.errors import BitpressError
from bitpress.output import manifest as manifests
from bitpress.output.file_proof import Workers, verify_files
from bitpress.output.manifest import FileRecord, Manifest
from bitpress.planning.run_options import RunOptions
from bitpress.runtime.version import __version__


def read_finished(job: Job, folder: Path, options: RunOptions, num_threads: int) -> Manifest | None:
    """The manifest of a folder that this job has finished; None where it holds something else.

    The same versions, recipe, calibration tokens and source have written it, with the same proof,
    and it is as it was written. All of it and the source are read for that.
    """
    if not (folder / filenames.CONFIG).is_file() or (folder / filenames.RUN_RECORD).exists():
        return None
    try:
        manifest = manifests.read_manifest(folder)
    except BitpressError:
        return None
    is_same = (
        manifests.is_intact(folder)
        and _is_same_plan(job, manifest, folder)
        and _is_same_check(job, manifest, options)
        and _is_same_source(job, manifest, num_threads)
    )
    if not is_same:
        return None
    _, faults = verify_files(manifest.files, folder, Workers(num_threads))
    return None if faults else manifest


def _is_same_plan(job: Job, manifest: Manifest, folder: Path) -> bool:
    """Whether the files are those that were planned: weight files by their headers, which carry the
    plan's digest.
    """
    plan = job.plan
    config = format_json(plan.config).encode()
    if manifest.bitpress != __version__ or {*manifest.files, filenames.MANIFEST} != {*plan.files}:
        return False
    if manifest.files[filenames.CONFIG].sha256 != hash_bytes(config):
        return False
    try:
        headers = {shard.name: read_header(folder / shard.name) for shard in plan.shards}
    except BitpressError:
        return False
    return all(headers[shard.name].is_same_layout(shard.header) for shard in plan.shards)


def _is_same_check(job: Job, manifest: Manifest, options: RunOptions) -> bool:
    """Whether what proves the output now was proved then."""
    if options.verify and not all(record.sha256 for record in manifest.files.values()):
        return False
    if job.check_text is None:
        return True
    check = manifest.check
    if check is None or check.sha256 != job.check_text.digest:
        return False
    return options.max_kl is None or (check.kl is not None and check.kl <= options.max_kl)


def _is_same_source(job: Job, manifest: Manifest, num_threads: int) -> bool:
    source = job.plan.source
    files = {name: source.folder / name for name in source.headers}
    if any(manifest.inputs.get(name, FileRecord(0)).sha256 is None for name in files):
        return False
    copies = {name: source.folder / copied for name, copied in job.plan.side_files.items()}
    if any(manifest.files[name].sha256 != hash_file(file) for name, file in copies.items()):
        return False
    return dict(manifest.inputs) == manifests.describe_files(files, num_threads)
