"""`bitpress.json`: what an output was made from and by, the digest of every file, and the error of every layer."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import attrs
from attrs import field, frozen

from bitpress.checkpoint.reader import read_json
from bitpress.errors import CheckpointError

NAME = "bitpress.json"
Rescaled = Mapping[str, Sequence[int]]


@frozen
class FileNote:
    """Size and SHA-256 of a file; no digest where none was taken."""

    bytes: int
    sha256: str | None = None


@frozen
class LayerNote:
    """One compressed layer.

    Attributes:
        shape: (out, in) of the source's weight.
        dtype: of the source's weight, as safetensors names it.
        bits: stored bits per weight, scales included.
        error: ||restored - source|| / ||source||, measured on the written file; None where it was not verified.
        output_error: ||x (W - Q)ᵀ|| / ||x Wᵀ|| on a sample of calibration inputs; None where there were none.
    """

    steps: tuple[str, ...]
    shape: tuple[int, int]
    dtype: str
    bits: float
    error: float | None = None
    output_error: float | None = None


@frozen
class Check:
    """How well a model predicts a text, and beside its source where that was run too (None where it was not).

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
        rescaled: by tensor of the source, the exponents of two by which its "columns" and "rows" were multiplied first.
        check: how well it predicts a text; None where that was not asked for.
    """

    bitpress: str
    schemes: Mapping[str, str]
    recipe: Mapping[str, Any]
    source: str
    inputs: Mapping[str, FileNote]
    files: Mapping[str, FileNote]
    layers: Mapping[str, LayerNote]
    data: Mapping[str, str] | None = None
    warnings: tuple[str, ...] = ()
    rescaled: Mapping[str, Rescaled] = field(factory=dict)
    check: Check | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return attrs.asdict(self)

    @property
    def bits(self) -> float:
        """Mean stored bits per weight of the compressed layers."""
        sizes = {name: note.shape[0] * note.shape[1] for name, note in self.layers.items()}
        return sum(note.bits * sizes[name] for name, note in self.layers.items()) / max(sum(sizes.values()), 1)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an output folder.

    Raises:
        CheckpointError: there is none, or it is not one.
    """
    if folder.is_dir() and not (folder / NAME).is_file():
        raise CheckpointError(f"{folder} was not written by bitpress, or not to its end: it has no {NAME}")
    table = read_json(folder / NAME)
    try:
        notes = {key: {n: FileNote(**note) for n, note in table[key].items()} for key in ("inputs", "files")}
        layers = {
            name: LayerNote(**{**note, "steps": tuple(note["steps"]), "shape": tuple(note["shape"])})
            for name, note in table["layers"].items()
        }
        check = Check(**{**table["check"], "drift": tuple(table["check"]["drift"])}) if table.get("check") else None
        return Manifest(**{**table, **notes, "layers": layers, "warnings": tuple(table.get("warnings", ())), "check": check})
    except (KeyError, TypeError, AttributeError) as e:
        raise CheckpointError(f"{folder / NAME}: it is not what this version writes ({type(e).__name__}: {e})") from None


def file_notes(files: Mapping[str, Path], threads: int, digests: bool = True) -> dict[str, FileNote]:
    """Sizes and, if asked for, digests of files on disk, by the names they were given."""
    if not digests:
        return {name: FileNote(file.stat().st_size) for name, file in files.items()}
    with ThreadPoolExecutor(threads) as pool:
        return dict(zip(files, pool.map(_note, files.values()), strict=True))


def _note(file: Path) -> FileNote:
    with file.open("rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
        return FileNote(f.tell(), digest)
