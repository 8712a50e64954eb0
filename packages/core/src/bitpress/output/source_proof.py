"""What a model that a source format reads holds, and whether its numbers are sound."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import attrs
from attrs import frozen

from bitpress.checkpoint import filenames
from bitpress.checkpoint.reader import DTYPES, Reader, open_checkpoint
from bitpress.checkpoint.safetensors import Entry
from bitpress.checkpoint.source import Source, resolve_source
from bitpress.checkpoint.source_formats import discover_formats
from bitpress.errors import CheckpointError, Fault
from bitpress.output.file_proof import Workers
from bitpress.output.verify import VerificationReport
from bitpress.planning.source_bits import find_quantized, stored_bits
from bitpress.runtime.devices import torch_threads
from bitpress.runtime.progress import Progress


@frozen
class SourceWeight:
    """A weight in fewer bits than its dtype has.

    Attributes:
        bits: per weight, scales included.
        dtype: what it is decoded to, as safetensors names it.
    """

    shape: tuple[int, ...]
    bits: float
    dtype: str


@frozen
class SourceDescription:
    """What is inside a model that a source format reads.

    Attributes:
        method: what it was quantized with.
        weights: by name.
        bits: of all of them, per weight.
        remarks: what is lost by reading it.
    """

    method: str
    weights: Mapping[str, SourceWeight]
    bits: float
    remarks: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """All of it."""
        return attrs.asdict(self)


def open_source(folder: Path) -> Source | None:
    """The model in a folder, where a source format reads it; None for what bitpress has written,
    and for a plain model.

    Raises:
        CheckpointError: it is quantized, and no installed format reads it.
    """
    if (folder / filenames.MANIFEST).is_file():
        return None
    source = resolve_source(open_checkpoint(folder))
    if method := source.model_config.quantization_method:
        raise CheckpointError(
            f"{folder} was not written by bitpress, or not to its end: it has no "
            f"{filenames.MANIFEST}; it is quantized ({method}), and "
            f"{discover_formats().explain(method)}"
        )
    return source if source.method else None


def describe_source(source: Source) -> SourceDescription:
    """What a source holds, from headers alone."""
    assert source.method is not None
    found = find_quantized(source)
    weights = {
        entry.name: SourceWeight(entry.shape, stored_bits(entry), entry.dtype) for entry in found
    }
    numel = sum(entry.numel for entry in found)
    bits = sum(stored_bits(entry) * entry.numel for entry in found) / max(numel, 1)
    return SourceDescription(source.method, weights, bits, source.remarks)


def prove_source(source: Source, workers: Workers, progress: Progress) -> VerificationReport:
    """Which weights of a source are not finite numbers when they are decoded.

    Args:
        workers: of one process; they report to `progress`.
    """
    entries = find_quantized(source)
    report_progress = progress("verifying", sum(entry.nbytes for entry in entries))

    def prove(entry: Entry) -> list[Fault]:
        faults = []
        try:
            chunks = (chunk.view(DTYPES[entry.dtype]) for chunk in reader.chunks(entry))
            if not all(chunk.isfinite().all() for chunk in chunks):
                faults.append(Fault(entry.name, "it is decoded to NaN or infinity"))
        except CheckpointError as e:
            faults.append(Fault(entry.name, str(e)))
        report_progress(entry.nbytes, entry.name)
        return faults

    with torch_threads(1), Reader() as reader, ThreadPoolExecutor(workers.num_threads) as pool:
        faults = [fault for found in pool.map(prove, entries) for fault in found]
    return VerificationReport(tuple(faults), {})
