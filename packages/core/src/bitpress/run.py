"""The commands as functions: `plan`, `compress`, `verify`, `inspect`, `decompress`."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import attrs
import torch

from bitpress import __version__, manifest, recipe, stream, verification
from bitpress.checkpoint.reader import INDEX, Checkpoint, open_checkpoint, resolve
from bitpress.checkpoint.writer import OutputFolder, json_text
from bitpress.decompression import write_dense
from bitpress.errors import BitpressError, CheckpointError, OutputError, RecipeError, VerificationError
from bitpress.manifest import FileNote, LayerNote, Manifest, read_manifest
from bitpress.planning import Plan, make_plan
from bitpress.schemes import discover

Progress = Callable[[str, int], Callable[[int], None]]  # a stage's name and bytes -> what is called with bytes done
RUNTIME = 450_000_000  # bytes of memory that Python with torch takes before any work


def quiet(stage: str, total: int) -> Callable[[int], None]:
    """Progress that nobody looks at."""
    return lambda done: None


def plan(
    model: str | Path, *, scheme: str | None = None, recipe_file: str | Path | None = None,
    settings: Iterable[str] = (), ignore: Iterable[str] = (),
) -> Plan:  # fmt: skip
    """What `compress` would do, from headers alone.

    Args:
        model: a folder, or a Hub name.
        scheme: a scheme's name, or several joined by `+`; give this or `recipe_file`.
        settings: `[SCHEME.]OPTION=VALUE` texts.
        ignore: patterns of layers to leave alone.

    Raises:
        BitpressError: the model, the recipe, or their combination cannot be carried out.
    """
    if (scheme is None) == (recipe_file is None):
        raise RecipeError("give either a scheme or a recipe file")
    source = open_checkpoint(resolve(model))
    registry = discover()
    if scheme is not None:
        return make_plan(source, recipe.from_scheme(scheme, registry, settings, ignore))
    return make_plan(source, recipe.from_file(Path(recipe_file or ""), registry, settings, ignore))


def memory(work: Plan, threads: int | None = None) -> int:
    """Bytes that a run of the plan holds at most, Python and torch included."""
    return RUNTIME + work.memory(threads or _cores())


def compress(
    model: str | Path, out: str | Path, *, scheme: str | None = None, recipe_file: str | Path | None = None,
    settings: Iterable[str] = (), ignore: Iterable[str] = (), device: str = "cpu", threads: int | None = None,
    max_memory: int | None = None, verify: bool = True, progress: Progress = quiet,
) -> Manifest:  # fmt: skip
    """Write a smaller model into the folder `out`, and prove it unless `verify` is off.

    An interrupted run goes on from its finished shards when it is started again. `config.json` is written last: without it no
    loader takes the folder for a model.

    Args:
        device: what computes; the bytes written do not depend on `threads`.
        max_memory: bytes; a run that would need more is refused.

    Raises:
        BitpressError: bad input, found before the work starts where headers show it.
        VerificationError: the written files are not what was planned; `config.json` was not written.
    """
    work = plan(model, scheme=scheme, recipe_file=recipe_file, settings=settings, ignore=ignore)
    return carry_out(work, str(model), out, device, threads, max_memory, verify, progress)


def carry_out(
    work: Plan, model: str, out: str | Path, device: str = "cpu", threads: int | None = None,
    max_memory: int | None = None, verify: bool = True, progress: Progress = quiet,
) -> Manifest:  # fmt: skip
    """`compress` for a plan that was made already."""
    target, count = _device(device), threads or _cores()
    if max_memory is not None and max_memory < (needed := memory(work, count)):
        raise RecipeError(
            f"the run needs about {needed / 1e6:,.0f} MB of memory, more than the {max_memory / 1e6:,.0f} MB allowed; "
            "fewer threads need less"
        )
    output = OutputFolder(Path(out))
    if output.folder.resolve().is_relative_to(work.source.folder.resolve()):
        raise OutputError(f"{out} is the source or lies inside it; name another folder")
    output.prepare(work.files, work.bytes_after)
    with _one_thread_per_task():
        stream.write_shards(work, output, count, target, progress("compressing", work.bytes_before))
        for name in work.source.others:
            if name not in ("config.json", manifest.NAME):
                output.copy(name, work.source.folder / name)
        if work.index:
            output.text(INDEX, json_text(work.index))
        note = _note(work, model, output, count, verify)
        if verify:
            note = _prove(note, work, output, count, progress("verifying", work.bytes_after))
    output.text(manifest.NAME, json_text(note.as_json()))
    output.text("config.json", json_text(work.config))
    return note


def verify(
    out: str | Path, against: str | Path | None = None, threads: int | None = None, progress: Progress = quiet
) -> verification.Report:
    """Open an output again and prove it: files, config, scales, and with `against`, the source, every weight.

    Raises:
        BitpressError: the folder was not written by bitpress, or a scheme that wrote it is not installed.
    """
    folder, count = Path(out), threads or _cores()
    note = read_manifest(folder)
    source = open_checkpoint(resolve(against)) if against is not None else None
    faults = tuple(verification.verify_files(note.files, folder, count))
    try:
        checkpoint = open_checkpoint(folder)
    except CheckpointError as e:
        return verification.Report((*faults, str(e)), {})
    size = sum(header.nbytes for header in checkpoint.headers.values())
    with _one_thread_per_task():
        report = verification.verify_tensors(_written(note, checkpoint), source, count, progress("verifying", size))
    return verification.Report(faults + report.faults, report.errors)


def inspect(out: str | Path) -> Manifest:
    """What is inside an output: schemes, bits per weight, error per layer."""
    return read_manifest(Path(out))


def decompress(out: str | Path, dense: str | Path, progress: Progress = quiet) -> None:
    """Write the plain checkpoint that an output's loader computes with."""
    checkpoint = open_checkpoint(Path(out))
    written = _written(read_manifest(Path(out)), checkpoint)
    total = sum(note.shape[0] * note.shape[1] * 2 for note in written.layers.values())
    with _one_thread_per_task():
        write_dense(written, OutputFolder(Path(dense)), progress("decompressing", total))


def _written(note: Manifest, checkpoint: Checkpoint) -> verification.Written:
    rules = recipe.from_json(note.recipe, discover(), str(checkpoint.folder / manifest.NAME))
    return verification.written_by(note, checkpoint, rules)


def _note(work: Plan, model: str, output: OutputFolder, threads: int, digests: bool) -> Manifest:
    """The manifest before anything was proved; digests take a pass over every byte and are left out unless asked for."""
    config = json_text(work.config).encode()
    written = {name: output.folder / name for name in work.files if name not in ("config.json", manifest.NAME)}
    files = manifest.file_notes(written, threads, digests)
    files["config.json"] = FileNote(len(config), hashlib.sha256(config).hexdigest())
    inputs = manifest.file_notes({name: work.source.folder / name for name in work.source.headers}, threads, digests)
    layers = {
        module: LayerNote(
            tuple(s.scheme.name for s in stack.steps), (entry.shape[0], entry.shape[1]), entry.dtype, stack.bits(module)
        )
        for stack in work.stacks
        for module, entry in stack.members.items()
    }
    schemes = {step.scheme.name: f"{step.scheme.package} {step.scheme.version}" for step in work.recipe.all_steps}
    name = model if "/" in model and not Path(model).exists() else Path(model).resolve().name
    return Manifest(__version__, schemes, work.recipe.as_json(), name, inputs, files, layers)


def _prove(note: Manifest, work: Plan, output: OutputFolder, threads: int, done: Callable[[int], None]) -> Manifest:
    """The manifest with every layer's error, measured on the files; raises VerificationError where something is wrong."""
    checkpoint = open_checkpoint(output.folder, config=work.config)
    report = verification.verify_tensors(verification.Written(checkpoint, work.recipe, note.layers), work.source, threads, done)
    if report.faults:
        raise VerificationError(f"{output.folder}: the written files are not what was planned; delete the folder", report.faults)
    return attrs.evolve(note, layers={m: attrs.evolve(layer, error=report.errors[m]) for m, layer in note.layers.items()})


def _device(name: str) -> torch.device:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise BitpressError(f"--device {name}: it is cpu, cuda or cuda:N")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise BitpressError(f"--device {name}: {str(e).splitlines()[0]}") from None
    return device


def _cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _one_thread_per_task() -> Iterator[None]:
    """Tasks run side by side, each on one core: torch's own threads would only wait for each other on tiles this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
