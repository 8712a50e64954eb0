"""`bitpress.json`: what an output was made from and by, the digest of every file and of itself, and
the error of every layer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import attrs
from attrs import field, frozen, validators

from bitpress.checkpoint.digests import hash_file
from bitpress.checkpoint.filenames import MANIFEST
from bitpress.checkpoint.reader import read_json
from bitpress.checkpoint.safetensors import is_name
from bitpress.checkpoint.signed_json import OWN_DIGEST, is_signed, sign_json
from bitpress.errors import CheckpointError
from bitpress.output.rescaling import Rescaled
from bitpress.output.typed_json import parse_typed
from bitpress.runtime.process_group import SINGLE_PROCESS, ProcessGroup

Described = TypeVar("Described")


_is_digest = validators.optional(validators.matches_re("[0-9a-f]{64}"))


@frozen
class FileRecord:
    """Size and digests of a file.

    Attributes:
        sha256: of the file; None where it was not read.
        header: SHA-256 of the header of a weight file that the run wrote. The header holds the
            digest of each tensor, taken in memory before it was written. None for other files.
    """

    bytes: int = field(validator=validators.ge(0))
    sha256: str | None = field(default=None, validator=_is_digest)
    header: str | None = field(default=None, validator=_is_digest)


@frozen
class LayerRecord:
    """One compressed layer.

    Attributes:
        steps: names of the schemes that it went through, in order.
        shape: (out, in) of the source's weight.
        dtype: of the source's weight, as safetensors names it.
        bits: stored bits per weight, scales included.
        error: ||dequantized - source|| / ||source|| of what was written; None where it was not
            verified.
        rounding_error: the error that plain rounding would have had, where the scheme moves weights
            further on purpose; None elsewhere.
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
    rounding_error: float | None = None
    output_error: float | None = None
    tokens: int | None = None

    @property
    def stored_bytes(self) -> int:
        """Bytes of all that is stored of it."""
        num_rows, num_columns = self.shape
        return round(self.bits * num_rows * num_columns / 8)


@frozen
class CacheRecord:
    """The keys and values that an engine keeps of one attention.

    Attributes:
        heads: of keys and of values.
        query_heads: of queries.
        channels: of a head.
        dtype: of the model's weights there, as safetensors names it.
    """

    heads: int = field(validator=validators.ge(1))
    query_heads: int = field(validator=validators.ge(1))
    channels: int = field(validator=validators.ge(1))
    dtype: str


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
        warnings: what the user should know of the text, such as which chats were left out.
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
    warnings: tuple[str, ...] = ()


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


def _check_layer_names(manifest: Manifest, attribute: Any, layers: Mapping[str, Any]) -> None:
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
        warnings: of the run, one line each, but for those that concern the machine it ran on.
        rescaled: by tensor of the source, the exponents of two by which its "columns" and "rows"
            were multiplied first.
        blocks: by decoder block, ||h - h'|| / ||h'|| of the hidden states after it, h' the
            source's, on the calibration data that the source was run on too; none where it was not.
        check: how well it predicts a text; None where that was not asked for.
        revision: the source's commit on the Hub; None where it was not downloaded from there.
        caches: by attention, the caches for which something is stored.
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
    revision: str | None = None
    caches: Mapping[str, CacheRecord] = field(factory=dict, validator=_check_layer_names)

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
    """The content of the file: the manifest, and last the SHA-256 of the file itself."""
    return sign_json(manifest.as_json())


def is_intact(folder: Path) -> bool:
    """Whether the manifest of a folder is, to the byte, what was written."""
    return is_signed((folder / MANIFEST).read_bytes())


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

    def describe(name: str) -> FileRecord:
        return FileRecord(files[name].stat().st_size, hash_file(files[name]))

    return map_files(describe, files, num_threads, process_group)


def map_files(
    describe: Callable[[str], Described],
    files: Mapping[str, Path],
    num_threads: int,
    process_group: ProcessGroup = SINGLE_PROCESS,
) -> dict[str, Described]:
    """What reading each file gives, by its name; each rank reads its share, side by side."""
    names = process_group.partition_by_size(list(files), lambda name: files[name].stat().st_size)
    with ThreadPoolExecutor(num_threads) as pool:
        share = dict(zip(names, pool.map(describe, names), strict=True))
    merged = {
        name: described
        for part in process_group.all_gather_object(share)
        for name, described in part.items()
    }
    return {name: merged[name] for name in files}
