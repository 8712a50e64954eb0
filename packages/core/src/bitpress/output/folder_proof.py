"""The proof of an output folder: its files, its tensors, and beside the source its weights."""

from __future__ import annotations

from pathlib import Path

import attrs

from bitpress.checkpoint import filenames
from bitpress.checkpoint.hub import resolve
from bitpress.checkpoint.reader import Checkpoint, open_checkpoint
from bitpress.checkpoint.rotated_source import round_copies
from bitpress.checkpoint.source import fuse_uncompressed_experts, resolve_source
from bitpress.errors import CheckpointError, Fault
from bitpress.output import file_proof
from bitpress.output.engine_check import find_engine_faults
from bitpress.output.file_proof import Workers
from bitpress.output.manifest import Manifest, is_intact, read_manifest
from bitpress.output.open_model import read_recipe, read_written
from bitpress.output.source_proof import open_source, prove_source
from bitpress.output.verify import VerificationReport, verify_tensors
from bitpress.planning.rotation import rotate_source
from bitpress.runtime.devices import torch_threads
from bitpress.runtime.progress import Progress


def _read_source(manifest: Manifest, folder: Path, against: str) -> Checkpoint:
    """The source as the run has read it."""
    source = resolve_source(open_checkpoint(resolve(against)))
    if read_recipe(manifest, folder).rotates:
        source = rotate_source(source)
    return round_copies(fuse_uncompressed_experts(source, manifest.layers), manifest.layers)


def prove_folder(
    folder: Path, against: str | None, workers: Workers, progress: Progress, engine: bool
) -> VerificationReport:
    """What is wrong with an output, and how far its weights are from the source's.

    Args:
        against: the source; None proves the output by itself.
        workers: of one process; they report to `progress`.
        engine: whether the vLLM of this environment is asked too.
    """
    if (folder / filenames.MANIFEST).is_file() and not is_intact(folder):
        fault = (
            "its bytes are not those that were written (its own SHA-256 differs), and it is what "
            "the rest is proved by"
        )
        return VerificationReport((Fault(filenames.MANIFEST, fault),), {})
    if against is None and (model := open_source(folder)):
        return prove_source(model, workers, progress)
    manifest = read_manifest(folder)
    source = None
    if against is not None:
        source = _read_source(manifest, folder, against)
    # files are read, and then their layers, or with a source all their tensors
    file_bytes = sum(record.bytes for record in manifest.files.values() if record.header)
    layer_bytes = sum(layer.stored_bytes for layer in manifest.layers.values())
    num_bytes = file_bytes + (layer_bytes if source is None else file_bytes)
    workers = attrs.evolve(workers, report_progress=progress("verifying", num_bytes))
    with torch_threads(1):
        _, faults = file_proof.verify_files(manifest.files, folder, workers)
        faults += file_proof.find_added_files(manifest.files, folder)
        try:
            checkpoint = open_checkpoint(folder)
        except CheckpointError as e:
            return VerificationReport((*faults, Fault("", str(e))), {})
        written = read_written(manifest, checkpoint)
        report = verify_tensors(written, source, workers)
        if source is not None:
            faults += file_proof.find_source_differences(
                manifest.files, folder, checkpoint.config, source
            )
    faults += report.faults
    if engine and not faults:
        faults += find_engine_faults(folder)
    remarks: tuple[str, ...] = ()
    if any(file.sha256 is None and file.header is None for file in manifest.files.values()):
        remarks = (
            "it was written with --no-verify by an earlier version: there are no digests by which "
            "a changed byte would be found",
        )
    return attrs.evolve(report, faults=tuple(dict.fromkeys(faults)), remarks=remarks)
