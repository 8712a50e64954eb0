"""`bitpress.json`: what an output was made from and by, the digest of every file and of itself, and
the error of every layer.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import attrs
from attrs import field, frozen, validators

from bitpress.checkpoint.filenames import MANIFEST
from bitpress.checkpoint.reader import read_json
from bitpress.checkpoint.safetensors import is_name
from bitpress.checkpoint.writer import format_json
from bitpress.errors import CheckpointError
from bitpress.output.typed_json import parse_typed
from bitpress.runtime.process_group import SINGLE_PROCESS, ProcessGroup

# The last key of the file: the digest of the file itself.
OWN_DIGEST = "sha256"

# Exponents of two, by the axis ("columns", "rows") that they multiply.
Rescaled = Mapping[str, Sequence[int]]


@frozen
class FileRecord:
    """Size and SHA-256 of a file; no digest where none was taken."""

    bytes: int = field(validator=validators.ge(0))
    sha256: str | None = field(
        default=None, validator=validators.optional(validators.matches_re("[0-9a-f]{64}"))
    )


@frozen
class LayerRecord:
    """One compressed layer.

    Attributes:
        steps: names of the schemes that it went through, in order.
        shape: (out, in) of the source's weight.
        dtype: of the source's weight, as safetensors names it.
        bits: stored bits per weight, scales included.
        error: ||dequantized - source|| / ||source||, measured on the written file; None where it
            was not verified.
        output_error: ||x (W - Q)ᵀ|| / ||x Wᵀ|| on a sample of calibration inputs; None where there
            were none.
        tokens: of the calibration data that a router sent to it; None for a layer that all tokens
            come to.
    """

    steps: tuple[str, ...]
    shape: tuple[int, int] = field(validator=validators.deep_iterable(validators.ge(1)))
    dtype: str
    bits: float
    error: float | None = None
    output_error: float | None = None
    tokens: int | None = None


@frozen
class Check:
    """How well a model predicts a text, and beside its source where that was run too (None where it
    was not).

    Attributes:
        sha256: of the tokens.
        tokens: that were predicted.
        rise: of the mean log-perplexity, in nats per token.
        kl: mean KL divergence from the source's predictions, in nats per token.
        top1: share of tokens whose most likely successor is the source's too.
        drift: after each block, ||h - h'|| / ||h'|| of the hidden states h' of the source.
    """

    text: str
    sha256: str
    tokens: int
    sequence_length: int
    perplexity: float
    source_perplexity: float | None = None
    rise: float | None = None
    kl: float | None = None
    top1: float | None = None
    drift: tuple[float, ...] = ()


def _check_calibration_data(
    manifest: Manifest, attribute: Any, data: Mapping[str, str] | None
) -> None:
    if data is None:
        return
    if not data.keys() >= {"source", "tokens"} or not re.fullmatch("[0-9]{1,18}", data["tokens"]):
        raise ValueError("'data' must name its source and the number of tokens")


def _check_filenames(manifest: Manifest, attribute: Any, files: Mapping[str, FileRecord]) -> None:
    for name in files:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\0" in name:
            raise ValueError(f"{name[:60]!r} is no file of the folder")


def _check_layer_names(
    manifest: Manifest, attribute: Any, layers: Mapping[str, LayerRecord]
) -> None:
    for name in layers:
        if not is_name(name):
            raise ValueError(f"{name[:60]!r} is no layer's name")


@frozen
class Manifest:
    """What `bitpress.json` holds.

    Attributes:
        bitpress: version of the core.
        schemes: package and version by scheme.
        recipe: with every option spelled out, as `Recipe.as_json` gives it.
        source: the model's name as it was given (a folder's own name, or a Hub name).
        inputs: the source's weight files.
        files: every file of the output but `bitpress.json` itself.
        data: what the run was calibrated on, and its digest; None where it needed no data.
        warnings: of the run, one line each.
        rescaled: by tensor of the source, the exponents of two by which its "columns" and "rows"
            were multiplied first.
        blocks: by decoder block, ||h - h'|| / ||h'|| of the hidden states after it, h' the
            source's, on the calibration data that the source was run on too; none where it was not.
        check: how well it predicts a text; None where that was not asked for.
    """

    bitpress: str
    schemes: Mapping[str, str]
    recipe: Mapping[str, Any]
    source: str
    inputs: Mapping[str, FileRecord]
    files: Mapping[str, FileRecord] = field(validator=_check_filenames)
    layers: Mapping[str, LayerRecord] = field(validator=_check_layer_names)
    data: Mapping[str, str] | None = field(default=None, validator=_check_calibration_data)
    warnings: tuple[str, ...] = ()
    rescaled: Mapping[str, Rescaled] = field(factory=dict)
    blocks: Mapping[str, float] = field(factory=dict)
    check: Check | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return attrs.asdict(self)

    @property
    def bits(self) -> float:
        """Mean stored bits per weight of the compressed layers."""
        records = self.layers.values()
        num_weights = sum(record.shape[0] * record.shape[1] for record in records)
        num_bits = sum(record.bits * (record.shape[0] * record.shape[1]) for record in records)
        return num_bits / max(num_weights, 1)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an output folder.

    Raises:
        CheckpointError: there is none, or it is not one.
    """
    file = folder / MANIFEST
    if folder.is_dir() and not file.is_file():
        raise CheckpointError(
            f"{folder} was not written by bitpress, or not to its end: it has no {MANIFEST}"
        )
    table = read_json(file)
    table.pop(OWN_DIGEST, None)
    try:
        manifest: Manifest = parse_typed(table, Manifest)
    except ValueError as e:
        raise CheckpointError(f"{file}: it is not what this version writes ({e!s:.200})") from None
    return manifest


def serialize(manifest: Manifest) -> str:
    """The content of the file: the manifest, and last the SHA-256 of the file itself, computed with
    zeros in the place of the digest.
    """
    zeros = "0" * 64
    blank = format_json({**manifest.as_json(), OWN_DIGEST: zeros})
    digest = hashlib.sha256(blank.encode()).hexdigest()
    return digest.join(blank.rsplit(zeros, 1))


def is_intact(folder: Path) -> bool:
    """Whether the manifest of a folder is, to the byte, what was written."""
    content = (folder / MANIFEST).read_bytes()
    # The digest is the last text of the file: 64 characters before the last quotation mark.
    start = content.rfind(b'"') - 64
    digest = content[start : start + 64]
    blank = content[:start] + b"0" * 64 + content[start + 64 :]
    return hashlib.sha256(blank).hexdigest().encode() == digest


def describe_files(
    files: Mapping[str, Path],
    num_threads: int,
    with_digests: bool = True,
    process_group: ProcessGroup = SINGLE_PROCESS,
) -> dict[str, FileRecord]:
    """Sizes and digests of files on disk; each rank reads its share of them.

    Args:
        files: paths by the names that the records get.
        num_threads: read and hash files side by side.
        with_digests: whether to read the files; sizes alone need no reading.
    """
    if not with_digests:
        return {name: FileRecord(file.stat().st_size) for name, file in files.items()}
    names = process_group.partition_by_size(list(files), lambda name: files[name].stat().st_size)
    with ThreadPoolExecutor(num_threads) as pool:
        records = pool.map(_hash_file, (files[name] for name in names))
        share = dict(zip(names, records, strict=True))
    merged = {
        name: record
        for part in process_group.all_gather_object(share)
        for name, record in part.items()
    }
    return {name: merged[name] for name in files}


def _hash_file(file: Path) -> FileRecord:
    with file.open("rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
        return FileRecord(f.tell(), digest)
