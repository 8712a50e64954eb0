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
from bitpress.checkpoint.writer import json_text
from bitpress.errors import CheckpointError
from bitpress.output.typed_json import typed
from bitpress.runtime.process_group import ALONE, Ranks

# its last key: the digest of the file itself
SELF = "sha256"

Rescaled = Mapping[str, Sequence[int]]


@frozen
class FileNote:
    """Size and SHA-256 of a file; no digest where none was taken."""

    bytes: int = field(validator=validators.ge(0))
    sha256: str | None = field(
        default=None, validator=validators.optional(validators.matches_re("[0-9a-f]{64}"))
    )


@frozen
class LayerNote:
    """One compressed layer.

    Attributes:
        shape: (out, in) of the source's weight.
        dtype: of the source's weight, as safetensors names it.
        bits: stored bits per weight, scales included.
        error: ||restored - source|| / ||source||, measured on the written file; None where it was
            not verified.
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


def _known_data(note: Manifest, field: Any, data: Mapping[str, str] | None) -> None:
    if data is not None and not (
        data.keys() >= {"source", "tokens"} and re.fullmatch("[0-9]{1,18}", data["tokens"])
    ):
        raise ValueError("'data' must name its source and the number of tokens")


def _within(note: Manifest, field: Any, files: Mapping[str, FileNote]) -> None:
    for name in files:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\0" in name:
            raise ValueError(f"{name[:60]!r} is no file of the folder")


def _named(note: Manifest, field: Any, layers: Mapping[str, LayerNote]) -> None:
    for name in layers:
        if not is_name(name):
            raise ValueError(f"{name[:60]!r} is no layer's name")


@frozen
class Manifest:
    """What `bitpress.json` holds.

    Attributes:
        bitpress: version of the core.
        schemes: package and version by scheme.
        source: the model's name as it was given (a folder's own name, or a Hub name).
        inputs: the source's weight files.
        files: every file of the output but `bitpress.json` itself.
        data: what the run was calibrated on, and its digest; None where it needed no data.
        warnings: what was found on the way, one line each.
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
    inputs: Mapping[str, FileNote]
    files: Mapping[str, FileNote] = field(validator=_within)
    layers: Mapping[str, LayerNote] = field(validator=_named)
    data: Mapping[str, str] | None = field(default=None, validator=_known_data)
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
        sizes = {name: note.shape[0] * note.shape[1] for name, note in self.layers.items()}
        return sum(note.bits * sizes[name] for name, note in self.layers.items()) / max(
            sum(sizes.values()), 1
        )


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an output folder.

    Raises:
        CheckpointError: there is none, or it is not one.
    """
    if folder.is_dir() and not (folder / MANIFEST).is_file():
        raise CheckpointError(
            f"{folder} was not written by bitpress, or not to its end: it has no {MANIFEST}"
        )
    table = read_json(folder / MANIFEST)
    table.pop(SELF, None)
    try:
        note: Manifest = typed(table, Manifest)
    except ValueError as e:
        raise CheckpointError(
            f"{folder / MANIFEST}: it is not what this version writes ({e!s:.200})"
        ) from None
    return note


def text(note: Manifest) -> str:
    """The file: the note, and last the SHA-256 of the file itself as it is with zeros in that
    place.
    """
    blank = json_text({**note.as_json(), SELF: "0" * 64})
    digest = hashlib.sha256(blank.encode()).hexdigest()
    return digest.join(blank.rsplit("0" * 64, 1))


def intact(folder: Path) -> bool:
    """Whether the manifest of a folder is, to the byte, what was written."""
    data = (folder / MANIFEST).read_bytes()
    # the last text of the file
    at = data.rfind(b'"') - 64
    digest = data[at : at + 64]
    return hashlib.sha256(data[:at] + b"0" * 64 + data[at + 64 :]).hexdigest().encode() == digest


def file_notes(
    files: Mapping[str, Path], threads: int, digests: bool = True, ranks: Ranks = ALONE
) -> dict[str, FileNote]:
    """Sizes and, if asked for, digests of files on disk, by the names they were given; each rank
    reads its share of them.
    """
    if not digests:
        return {name: FileNote(file.stat().st_size) for name, file in files.items()}
    own = ranks.deal(list(files), lambda name: files[name].stat().st_size)
    with ThreadPoolExecutor(threads) as pool:
        mine = dict(zip(own, pool.map(_note, (files[name] for name in own)), strict=True))
    found = {name: note for notes in ranks.gather(mine) for name, note in notes.items()}
    return {name: found[name] for name in files}


def _note(file: Path) -> FileNote:
    with file.open("rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
        return FileNote(f.tell(), digest)
