"""What is proved of the files of an output: they are those that were written, no others, and what
was copied is the source's.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from attrs import evolve, frozen

from bitpress.checkpoint import filenames
from bitpress.checkpoint.digests import hash_file, hash_shard
from bitpress.checkpoint.model_config import KEY
from bitpress.checkpoint.reader import Checkpoint
from bitpress.errors import CheckpointError, Fault
from bitpress.output.manifest import FileRecord, map_files
from bitpress.runtime.devices import CPU
from bitpress.runtime.process_group import SINGLE_PROCESS, ProcessGroup
from bitpress.runtime.progress import ReportProgress, ignore_bytes

# Signatures that lie beside what they sign.
SIGNATURES = (".sig", ".sigstore.json")

# Files that a run makes itself.
OWN_FILES = (filenames.CONFIG, filenames.MANIFEST, filenames.MODEL_CARD, filenames.INDEX)

# Keys of a config in which an output may differ from its source.
CHANGED_KEYS = (KEY, "compression_config")


@frozen(eq=False)
class Workers:
    """Who verifies.

    Attributes:
        num_threads: of each rank.
        report_progress: is given the bytes of each tensor and layer that was read.
        process_group: each rank reads its share; all return the same.
        devices: which share the layers: what is stored is decoded and compared there.
    """

    num_threads: int
    report_progress: ReportProgress = ignore_bytes
    process_group: ProcessGroup = SINGLE_PROCESS
    devices: Sequence[torch.device] = (CPU,)


def verify_files(
    records: Mapping[str, FileRecord], folder: Path, workers: Workers
) -> tuple[dict[str, FileRecord], list[Fault]]:
    """Read files, and hold them against their records.

    Returns:
        The records with the SHA-256 of every file, and the faults: missing, another size, other
        bytes.
    """
    present = {name: folder / name for name in records if (folder / name).is_file()}
    faults = [Fault(name, "the file is missing") for name in records if name not in present]

    def verify_file(name: str) -> tuple[FileRecord, list[Fault]]:
        return _verify_file(folder / name, name, records[name], workers.report_progress)

    verified = map_files(verify_file, present, workers.num_threads, workers.process_group)
    faults += [fault for _, file_faults in verified.values() for fault in file_faults]
    return {name: record for name, (record, _) in verified.items()}, faults


def _verify_file(
    file: Path, name: str, record: FileRecord, report_progress: ReportProgress
) -> tuple[FileRecord, list[Fault]]:
    """A file's record with its SHA-256, and what is wrong with it."""
    num_bytes = file.stat().st_size
    if num_bytes != record.bytes:
        return record, [Fault(name, f"{num_bytes} bytes, written were {record.bytes}")]
    changed = "its bytes are not those that were written (SHA-256 differs)"
    if record.header is None:
        sha256 = hash_file(file)
        is_changed = record.sha256 not in (None, sha256)
        return evolve(record, sha256=sha256), [Fault(name, changed)] * is_changed

    try:
        digests = hash_shard(file, report_progress)
    except CheckpointError:
        return record, [Fault(name, changed)]
    if digests.changed:
        return record, [Fault(name, f"tensor {tensor}: {changed}") for tensor in digests.changed]
    is_changed = digests.header != record.header or record.sha256 not in (None, digests.file)
    return evolve(record, sha256=digests.file), [Fault(name, changed)] * is_changed


def find_added_files(records: Mapping[str, FileRecord], folder: Path) -> Iterator[Fault]:
    """Files that were not written and that a loader may read: code, templates, other weights.

    Hidden files are left out, in which Git and the Hub keep their own, and signatures.
    """
    known = {*records, filenames.MANIFEST}
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        linked = [name for name in folders if (Path(root) / name).is_symlink()]
        for name in sorted([*files, *linked]):
            path = (Path(root) / name).relative_to(folder).as_posix()
            if not name.startswith(".") and not name.endswith(SIGNATURES) and path not in known:
                yield Fault(path, "it was not written by the run, and a loader may read it")


def find_source_differences(
    records: Mapping[str, FileRecord],
    folder: Path,
    config: Mapping[str, object],
    source: Checkpoint,
) -> Iterator[Fault]:
    """What an output has copied of its source, its config and its side files, and is not the same.

    Args:
        records: of the output's files.
        folder: of the output.
        config: its config.
        source: the checkpoint that was compressed.
    """
    for key in dict.fromkeys([*source.config, *config]):
        if key not in CHANGED_KEYS and config.get(key) != source.config.get(key):
            yield Fault(filenames.CONFIG, f"its {key} is not the source's")
    copies = {
        filenames.copied_name(name, source.side_files): name
        for name in source.side_files
        if name not in (filenames.CONFIG, filenames.MANIFEST)
    }
    # what the user asked for besides
    copies |= {name: name for name in records if name not in {*copies, *OWN_FILES}}
    for copied, name in copies.items():
        original, copy = source.folder / name, folder / copied
        if not copy.is_file() and name in source.side_files:
            yield Fault(copied, f"the source's {name} is missing")
        is_pair = original.is_file() and copy.is_file() and copied in records
        if is_pair and not records[copied].header and hash_file(copy) != hash_file(original):
            yield Fault(copied, f"it is not the source's {name}")
