"""SHA-256 of files and of the tensors in them: what is read is known to be what was written. And
what shows without reading that a file has changed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from attrs import frozen

from bitpress.checkpoint.reader import Reader
from bitpress.checkpoint.safetensors import Header, read_header
from bitpress.errors import CheckpointError
from bitpress.runtime.progress import ReportProgress, ignore_bytes

# Bytes that are read and hashed at a time.
CHUNK_BYTES = 1 << 20


@frozen
class ShardDigests:
    """What reading a weight file has shown.

    Attributes:
        file: of the whole file.
        header: of its header, in which the digests of the tensors stand.
        changed: tensors whose numbers are not those that the header's digests were taken of.
    """

    file: str
    header: str
    changed: tuple[str, ...]


def hash_bytes(content: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def hash_file(file: Path) -> str:
    """SHA-256 of a file in hexadecimal."""
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def hash_shard(file: Path, report_progress: ReportProgress = ignore_bytes) -> ShardDigests:
    """The digests of a weight file and of its tensors, in one pass.

    Args:
        report_progress: is given the bytes of the header and of every tensor.

    Raises:
        CheckpointError: the file cannot be read, or is no weight file.
    """
    header = read_header(file)
    expected = header.digests or {}
    whole, changed = hashlib.sha256(header.raw), []
    report_progress(len(header.raw), file.name)
    with Reader() as reader:
        for entry in header.entries:
            digest = hash_chunks(_tee(reader.chunks(entry, CHUNK_BYTES), whole))
            if digest != expected.get(entry.name, digest):
                changed.append(entry.name)
            report_progress(entry.nbytes, file.name)
    return ShardDigests(whole.hexdigest(), hash_bytes(header.raw), tuple(changed))


def find_changed_tensors(header: Header, num_threads: int) -> list[str]:
    """Tensors of a file whose numbers are not those that its header's digests were taken of.

    Raises:
        CheckpointError: the file cannot be read, or its header holds no digests.
    """
    expected = header.digests
    if expected is None:
        raise CheckpointError(f"{header.entries[0].file}: its header holds no digests of tensors")
    with Reader() as reader, ThreadPoolExecutor(num_threads) as pool:
        digests = pool.map(
            lambda entry: hash_chunks(reader.chunks(entry, CHUNK_BYTES)), header.entries
        )
        return [
            entry.name
            for entry, digest in zip(header.entries, digests, strict=True)
            if digest != expected[entry.name]
        ]


def hash_chunks(chunks: Iterable[torch.Tensor]) -> str:
    """SHA-256 of uint8 tensors, one after the other."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(memoryview(chunk.numpy()))  # type: ignore[arg-type]
    return digest.hexdigest()


def _tee(chunks: Iterable[torch.Tensor], digest: Any) -> Iterator[torch.Tensor]:
    for chunk in chunks:
        digest.update(memoryview(chunk.numpy()))  # type: ignore[arg-type]
        yield chunk


def read_stamp(file: Path) -> tuple[int, int] | None:
    """Size in bytes and time of the last change in ns of a file; None where there is none."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns
