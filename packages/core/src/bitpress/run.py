"""The command `compress` as a function."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import attrs
import torch

from bitpress import __version__, card, checking, journal, manifest, stream, verification
from bitpress.calibrate import loop
from bitpress.calibrate.memory import RUNTIME as CALIBRATED_RUNTIME
from bitpress.calibrate.notes import BlockNotes
from bitpress.calibrate.texts import Choice
from bitpress.checkpoint.reader import INDEX, open_checkpoint
from bitpress.checkpoint.writer import OutputFolder, json_text
from bitpress.compute import cores, devices_named, torch_threads
from bitpress.errors import OutputError, RecipeError, VerificationError
from bitpress.job import Job, named, plan, prepare
from bitpress.manifest import FileNote, LayerNote, Manifest
from bitpress.needs import disk, memory
from bitpress.planning import Plan
from bitpress.progress import Progress, Told, quiet
from bitpress.ranks import ALONE, Ranks

__all__ = ["Job", "carry_out", "compress", "plan", "prepare"]


def compress(
    model: str | Path,
    out: str | Path,
    *,
    scheme: str | None = None,
    recipe_file: str | Path | None = None,
    settings: Iterable[str] = (),
    ignore: Iterable[str] = (),
    calibration: str | Path | None = None,
    samples: int = Choice().samples,
    sequence_length: int = Choice().length,
    seed: int = 0,
    all_experts: bool = False,
    device: str = "cpu",
    threads: int | None = None,
    max_memory: int | None = None,
    trust_remote_code: bool = False,
    verify: bool = True,
    check: str | Path | None = None,
    max_kl: float | None = None,
    progress: Progress = quiet,
) -> Manifest:
    """Write a smaller model into the folder `out`, and prove it unless `verify` is off.

    An interrupted run goes on from its finished shards when it is started again. `config.json` is
    written last: without it no loader takes the folder for a model.

    Args:
        calibration: a .jsonl, .txt or .parquet file, or a dataset's name; None takes the text that
            ships with bitpress.
        samples: how many sequences of `sequence_length` tokens are taken of it.
        all_experts: whether every expert is fitted to all of them, and not to those that its router
            sends to it.
        device: what computes; the bytes written by schemes that need no data do not depend on
            `threads`.
        max_memory: bytes; a run that would need more is refused, one that could use more for speed
            does not.
        trust_remote_code: whether code in the model's folder may run.
        check: a text on which the result, run as it will be served, is compared with its source.
        max_kl: the most that their KL divergence may be there, in nats per token.

    Raises:
        BitpressError: bad input, found before the work starts where headers show it.
        VerificationError: the written files are not what was planned, or predict too badly;
            `config.json` was not written. After the second the shards stay, and the same call with
            another `max_kl` goes on from them.
    """
    choice = Choice(
        None if calibration is None else str(calibration),
        samples,
        sequence_length,
        seed,
        all_experts,
    )
    job = prepare(
        model,
        scheme=scheme,
        recipe_file=recipe_file,
        settings=settings,
        ignore=ignore,
        calibration=choice,
        check=None if check is None else str(check),
        trust_remote_code=trust_remote_code,
    )
    return carry_out(
        job, out, device, threads, max_memory, verify, max_kl, trust_remote_code, progress
    )


def carry_out(
    job: Job,
    out: str | Path,
    device: str = "cpu",
    threads: int | None = None,
    max_memory: int | None = None,
    verify: bool = True,
    max_kl: float | None = None,
    trust_remote_code: bool = False,
    progress: Progress = quiet,
    ranks: Ranks = ALONE,
) -> Manifest:
    """`compress` for a job that was prepared already, on this rank; all return the same."""
    work, devices = job.plan, devices_named(ranks.device(device))
    target = devices[0]
    count = threads or _threads(job, max_memory, ranks)
    tokens = math.ceil(job.data.ids.numel() / ranks.count) if job.data else 0
    if max_memory is not None and max_memory < (needed := memory(work, count, tokens)):
        raise RecipeError(
            f"the run needs about {needed / 1e6:,.0f} MB of memory, more than the "
            f"{max_memory / 1e6:,.0f} MB allowed"
            + ("" if job.data else "; fewer threads need less")
        )
    if max_kl is not None and (job.check is None or not max_kl >= 0):
        raise RecipeError(
            f"--max-kl {max_kl}: it is a number from 0 on, and needs a text to measure it on: "
            "--check FILE"
        )
    with OutputFolder(Path(out)) as output:
        if output.folder.resolve().is_relative_to(work.source.folder.resolve()):
            raise OutputError(f"{out} is the source or lies inside it; name another folder")
        place = checking.place(work, job.check, max_memory, output.folder) if job.check else None
        notes = [shard.name + loop.NOTES for shard in work.shards]
        if ranks.first:
            output.prepare([*work.files, *notes], disk(work, tokens, max_memory, ranks.count))
        before = journal.stamps(work.source)
        with (
            journal.kept(output, work, job.data, target)
            if ranks.first
            else contextlib.nullcontext()
        ):
            journal.agree(ranks, work, job.data, target)
            if not output.locked:
                raise OutputError(
                    f"rank {ranks.rank} does not see {out} as rank 0 has prepared it: all need one "
                    "file system"
                )
            note = _write(
                job,
                output,
                devices,
                count,
                max_memory,
                verify,
                trust_remote_code,
                progress,
                before,
                ranks,
            )
            if job.check and ranks.first:
                checkpoint = open_checkpoint(output.folder, config=work.config)
                written = verification.Written(checkpoint, work.recipe, note.layers, note.rescaled)
                with torch_threads(count):
                    found = checking.check(
                        written, work, job.check, target, place, trust_remote_code, progress
                    )
                checking.limit(found, max_kl, output.folder)
                note = attrs.evolve(note, check=found)
            journal.check_unchanged(work.source, before)
            if ranks.first:
                note = _carded(job, note, output)
                output.text(manifest.NAME, manifest.text(note))
                output.text("config.json", json_text(work.config))
                output.remove(notes)
        return ranks.same(note)


def _write(
    job: Job,
    output: OutputFolder,
    devices: Sequence[torch.device],
    count: int,
    max_memory: int | None,
    verify: bool,
    trust_remote_code: bool,
    progress: Progress,
    before: journal.Stamps,
    ranks: Ranks,
) -> Manifest:
    """Every file but the last two, proved."""
    work = job.plan
    told = progress(
        "compressing",
        work.bytes_before if job.data else sum(shard.reads for shard in stream.own(work, ranks)),
    )
    blocks: list[BlockNotes] = []
    if job.data:
        limit = None if max_memory is None else max_memory - CALIBRATED_RUNTIME
        with torch_threads(count):
            blocks = loop.write_shards(
                work, output, job.data, devices[0], limit, trust_remote_code, told, ranks
            )
    # tasks run side by side, each on one core: torch's own threads would only wait for each other
    with torch_threads(1):
        if not job.data:
            stream.write_shards(work, output, count, devices, told, ranks)
        for name, origin in work.copied.items() if ranks.first else ():
            output.copy(name, work.source.folder / origin)
        if work.index and ranks.first:
            output.text(INDEX, json_text(work.index))
        # whose faults would otherwise seem to be the output's
        journal.check_unchanged(work.source, before)
        ranks.wait()
        note = _note(job, output, count, verify, blocks, ranks)
        if verify:
            note = _prove(
                note,
                work,
                output,
                count,
                progress("verifying", work.bytes_after // ranks.count),
                ranks,
            )
    return note


def _carded(job: Job, note: Manifest, output: OutputFolder) -> Manifest:
    """The manifest with the model card, which is written."""
    work = job.plan
    origin = next((name for name, source in work.copied.items() if source == card.NAME), None)
    made = card.Made(job.command, work.bytes_before, work.bytes_after, work.source.folder, origin)
    content = card.text(note, made)
    output.text(card.NAME, content)
    data = content.encode()
    files = {**note.files, card.NAME: FileNote(len(data), hashlib.sha256(data).hexdigest())}
    return attrs.evolve(note, files=files)


def _threads(job: Job, max_memory: int | None, ranks: Ranks = ALONE) -> int:
    """As many as there are cores for a rank, or fewer where memory is short and each thread takes
    its own.
    """
    most = max(cores() // ranks.beside, 1)
    if job.data or max_memory is None:
        return most
    return next((count for count in range(most, 1, -1) if memory(job.plan, count) <= max_memory), 1)


def _note(
    job: Job,
    output: OutputFolder,
    threads: int,
    digests: bool,
    found: Sequence[BlockNotes],
    ranks: Ranks,
) -> Manifest:
    """The manifest before anything was proved; digests take a pass over every byte and are left out
    unless asked for.
    """
    work = job.plan
    config = json_text(work.config).encode()
    written = {
        name: output.folder / name
        for name in work.files
        if name not in ("config.json", manifest.NAME, card.NAME)
    }
    files = manifest.file_notes(written, threads, digests, ranks)
    files["config.json"] = FileNote(len(config), hashlib.sha256(config).hexdigest())
    inputs = manifest.file_notes(
        {name: work.source.folder / name for name in work.source.headers}, threads, digests, ranks
    )
    errors = {name: error for block in found for name, error in block.errors.items()}
    tokens = {name: count for block in found for name, count in block.tokens.items()}
    layers = {
        module: LayerNote(
            tuple(s.scheme.name for s in stack.steps),
            (entry.shape[0], entry.shape[1]),
            entry.dtype,
            stack.bits(module),
            output_error=errors.get(module),
            tokens=tokens.get(module),
        )
        for stack in work.stacks
        for module, entry in stack.members.items()
    }
    schemes = {
        step.scheme.name: f"{step.scheme.package} {step.scheme.version}"
        for step in work.recipe.all_steps
    }
    data = (
        {"source": job.data.source, "tokens": str(job.data.ids.numel()), "sha256": job.data.digest}
        if job.data
        else None
    )
    if data and job.data and job.data.all_experts:
        data["experts"] = "every token"
    return Manifest(
        __version__,
        schemes,
        work.recipe.as_json(),
        named(job.model),
        inputs,
        files,
        layers,
        data,
        warnings=tuple(text for block in found for text in block.warnings),
        rescaled={tensor: change for block in found for tensor, change in block.rescaled.items()},
        blocks={name: error for block in found for name, error in block.blocks.items()},
    )


def _prove(
    note: Manifest, work: Plan, output: OutputFolder, threads: int, done: Told, ranks: Ranks
) -> Manifest:
    """The manifest with every layer's error, measured on the files; raises VerificationError where
    something is wrong.
    """
    checkpoint = open_checkpoint(output.folder, config=work.config)
    written = verification.Written(checkpoint, work.recipe, note.layers, note.rescaled)
    report = verification.verify_tensors(written, work.source, threads, done, ranks)
    if report.faults:
        raise VerificationError(
            f"{output.folder}: the written files are not what was planned; delete the folder",
            report.faults,
        )
    return attrs.evolve(
        note,
        layers={m: attrs.evolve(layer, error=report.errors[m]) for m, layer in note.layers.items()},
    )
