"""What is done with a model that is on disk, as functions: `verify`, `inspect`, `evaluate`,
`report`, `decompress`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from bitpress import evaluate as evaluation, manifest, recipe, stacks, verification
from bitpress.calibrate.texts import stretch
from bitpress.checkpoint.reader import Checkpoint, Reader, open_checkpoint, resolve
from bitpress.checkpoint.writer import OutputFolder
from bitpress.compute import cores, device_named, torch_threads
from bitpress.decompression import write_dense
from bitpress.errors import CheckpointError, OutputError
from bitpress.manifest import Check, Manifest, read_manifest
from bitpress.progress import Progress, quiet
from bitpress.quantization import quantised_already
from bitpress.report.page import START, page
from bitpress.schemes import discover
from bitpress.served import Subject, plain, served
from bitpress.source import kept_fused, seen


def verify(
    out: str | Path,
    against: str | Path | None = None,
    threads: int | None = None,
    progress: Progress = quiet,
) -> verification.Report:
    """Open an output again and prove it: files, config, scales, and with `against`, the source,
    every weight.

    Raises:
        BitpressError: the folder was not written by bitpress, or a scheme that wrote it is not
            installed.
    """
    folder, count = Path(out), threads or cores()
    if (folder / manifest.NAME).is_file() and not manifest.intact(folder):
        fault = (
            "its bytes are not those that were written (its own SHA-256 differs), and it is "
            "what the rest is proved by"
        )
        return verification.Report((f"{manifest.NAME}: {fault}",), {})
    note = read_manifest(folder)
    source = seen(open_checkpoint(resolve(against))) if against is not None else None
    faults = tuple(verification.verify_files(note.files, folder, count))
    try:
        checkpoint = open_checkpoint(folder)
    except CheckpointError as e:
        return verification.Report((*faults, str(e)), {})
    size = sum(header.nbytes for header in checkpoint.headers.values())
    with torch_threads(1):
        known = None if source is None else kept_fused(source, note.layers)
        report = verification.verify_tensors(
            _written(note, checkpoint), known, count, progress("verifying", size)
        )
    undigested = any(file.sha256 is None for file in note.files.values())
    remarks = (
        (
            "it was written with --no-verify: there are no digests by which a changed byte would "
            "be found",
        )
        if undigested
        else ()
    )
    return verification.Report(faults + report.faults, report.errors, remarks)


def inspect(out: str | Path) -> Manifest:
    """What is inside an output: schemes, bits per weight, error per layer."""
    return read_manifest(Path(out))


def report(out: str | Path, file: str | Path | None = None) -> Path:
    """Write one self-contained HTML page about an output; returns where: `file`, or the folder's
    own name with .html beside it.

    Raises:
        BitpressError: the folder was not written by bitpress, matplotlib is not installed, or
            `file` is there and no page.
    """
    folder = Path(out)
    target = (
        folder.resolve().with_name(f"{folder.resolve().name}.html") if file is None else Path(file)
    )
    if target.exists() and not _is_page(target):
        raise OutputError(f"{target} is there and no page: name another file (--html)")
    content = page(read_manifest(folder), folder.resolve().name)
    OutputFolder(target.absolute().parent).text(target.name, content)
    return target


def _is_page(file: Path) -> bool:
    if not file.is_file():
        return False
    with file.open("rb") as f:
        return f.read(len(START)) == START.encode()


def decompress(out: str | Path, dense: str | Path, progress: Progress = quiet) -> None:
    """Write the plain checkpoint that an output's loader computes with."""
    written = _as_planned(open_checkpoint(Path(out)))
    total = sum(note.shape[0] * note.shape[1] * 2 for note in written.layers.values())
    with torch_threads(1), OutputFolder(Path(dense)) as output:
        write_dense(written, output, progress("decompressing", total))


def evaluate(
    model: str | Path,
    text: str | Path,
    against: str | Path | None = None,
    *,
    sequence_length: int = evaluation.LENGTH,
    max_tokens: int = evaluation.TOKENS,
    device: str = "cpu",
    threads: int | None = None,
    max_memory: int | None = None,
    trust_remote_code: bool = False,
    progress: Progress = quiet,
) -> Check:
    """How well a model predicts a text; and with `against`, how far its predictions are from that
    model's.

    Args:
        model: a plain model, or one that bitpress wrote: it is run as it will be served,
            activations rounded.
        text: a .jsonl, .txt or .parquet file.
        against: as `model`; usually its source.

    Raises:
        BitpressError: the text, or a model, cannot be used.
    """
    target = device_named(device)
    with Reader() as reader, torch_threads(threads or cores()):
        subject = _subject(resolve(model), reader)
        other = None if against is None else _subject(resolve(against), reader)
        origin = (other or subject).checkpoint
        tokens = stretch(
            str(text), sequence_length, max_tokens, origin.folder, origin.config, trust_remote_code
        )
        place = evaluation.spill(
            subject, other, tokens.inputs.numel(), max_memory, Path(tempfile.gettempdir())
        )
        told = progress("evaluating", evaluation.work(subject, other))
        return evaluation.evaluate(subject, other, tokens, target, place, trust_remote_code, told)


def _subject(folder: Path, reader: Reader) -> Subject:
    """A plain model, or one that bitpress wrote, ready to be run."""
    checkpoint = open_checkpoint(folder)
    if (folder / manifest.NAME).is_file():
        written = _as_planned(checkpoint)
        return served(written, reader, stacks.container(next(iter(written.layers))), folder)
    checkpoint = seen(checkpoint)
    if method := quantised_already(checkpoint.config):
        raise CheckpointError(
            f"{folder} is quantised ({method}), and not by bitpress: only plain models and its own "
            "can be run"
        )
    return plain(checkpoint, reader, stacks.container(next(iter(stacks.linear_layers(checkpoint)))))


def _written(note: Manifest, checkpoint: Checkpoint) -> verification.Written:
    rules = recipe.from_json(note.recipe, discover(), str(checkpoint.folder / manifest.NAME))
    return verification.written_by(note, checkpoint, rules)


def _as_planned(checkpoint: Checkpoint) -> verification.Written:
    """An output whose files hold what its manifest says; raises CheckpointError where headers or
    config say otherwise.
    """
    written = _written(read_manifest(checkpoint.folder), checkpoint)
    if fault := next(verification.structure(written), None):
        raise CheckpointError(
            f"{checkpoint.folder} is not as it was written: {fault} (bitpress verify tells all "
            "that is wrong)"
        )
    return written
