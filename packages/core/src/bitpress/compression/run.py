"""What a run is asked to do: a plan, and the texts that it needs."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import attrs
import torch
from attrs import frozen

from bitpress.checkpoint import filenames, layer_names
from bitpress.checkpoint.filenames import INDEX
from bitpress.checkpoint.hub import resolve
from bitpress.checkpoint.reader import Checkpoint, open_checkpoint
from bitpress.checkpoint.writer import OutputFolder, json_text
from bitpress.compression import accuracy_check, calibrated, data_free, resume
from bitpress.compression.calibration.block_result import BlockNotes
from bitpress.errors import OutputError, RecipeError, VerificationError
from bitpress.modeling.tokens import Sequences, Stretch, load
from bitpress.output import manifest, model_card, verify as verification, written_model
from bitpress.output.manifest import FileRecord, LayerRecord, Manifest
from bitpress.planning import recipe
from bitpress.planning.calibration_config import CalibrationConfig
from bitpress.planning.memory_estimate import estimate_disk, estimate_memory
from bitpress.planning.plan import Plan
from bitpress.planning.planner import make_plan, with_calibration
from bitpress.planning.recipe import Recipe
from bitpress.runtime.devices import cores, devices_named, torch_threads
from bitpress.runtime.memory import TRANSFORMERS_BYTES
from bitpress.runtime.process_group import ALONE, Ranks
from bitpress.runtime.progress import Progress, Told, quiet
from bitpress.runtime.version import __version__
from bitpress.schemes.registry import discover


@frozen(eq=False)
class Job:
    """A plan, and what goes with it.

    Attributes:
        data: what it is calibrated on; None where it needs no data.
        model: its name as it was given.
        check: a text to check the result on.
        command: a command line that asks for the same.
    """

    plan: Plan
    data: Sequences | None
    model: str
    check: Stretch | None = None
    command: str = ""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the user should know before starting."""
        return self.plan.warnings + (self.data.warnings if self.data else ())


def prepare(
    model: str | Path,
    *,
    scheme: str | None = None,
    recipe_file: str | Path | None = None,
    settings: Iterable[str] = (),
    ignore: Iterable[str] = (),
    calibration: CalibrationConfig | None = None,
    check: str | None = None,
    trust_remote_code: bool = False,
) -> Job:
    """The plan, the calibration data if the recipe needs some, and the text of `validate_weight`;
    as `plan` otherwise.
    """
    settings, ignore = tuple(settings), tuple(ignore)
    source, rules = resolve_request(model, scheme, recipe_file, settings, ignore)
    # what headers can refuse is refused before texts are read
    work = make_plan(source, rules)
    text = None if check is None else accuracy_check.text(work, check, trust_remote_code)
    chosen = (calibration or CalibrationConfig()) if rules.calibrated else None
    asked = {
        "--scheme": scheme,
        "--recipe": None if recipe_file is None else Path(recipe_file),
        "--set": settings,
        "--ignore": ignore,
        **(chosen.options if chosen else {}),
        "--check": None if check is None else Path(check),
    }
    command = model_card.format_command(named(str(model)), asked)
    if chosen is None:
        return Job(work, None, str(model), text, command)
    data = load(chosen, source.folder, source.config, trust_remote_code)
    if data.all_experts and not any(layer_names.experts(stack.members) for stack in work.stacks):
        raise RecipeError("--all-experts: no experts of this model are compressed; leave it out")
    return Job(
        with_calibration(work, data.digest + " all experts" * data.all_experts),
        data,
        str(model),
        text,
        command,
    )


def named(model: str) -> str:
    """The Hub name of a model, or its folder's own name."""
    return model if "/" in model and not Path(model).exists() else Path(model).resolve().name


def resolve_request(
    model: str | Path,
    scheme: str | None,
    recipe_file: str | Path | None,
    settings: Iterable[str],
    ignore: Iterable[str],
) -> tuple[Checkpoint, Recipe]:
    """The checkpoint and the recipe that a caller asked for."""
    if (scheme is None) == (recipe_file is None):
        raise RecipeError("give either a scheme or a recipe file")
    source, registry = open_checkpoint(resolve(model)), discover()
    if scheme is not None:
        return source, recipe.from_scheme(scheme, registry, settings, ignore)
    return source, recipe.from_file(Path(recipe_file or ""), registry, settings, ignore)


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
    if max_memory is not None and max_memory < (needed := estimate_memory(work, count, tokens)):
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
        place = (
            accuracy_check.place(work, job.check, max_memory, output.folder) if job.check else None
        )
        notes = [shard.name + filenames.BLOCK_RESULT_SUFFIX for shard in work.shards]
        if ranks.first:
            output.prepare(
                [*work.files, *notes], estimate_disk(work, tokens, max_memory, ranks.count)
            )
        before = resume.stamps(work.source)
        with (
            resume.kept(output, work, job.data, target) if ranks.first else contextlib.nullcontext()
        ):
            resume.agree(ranks, work, job.data, target)
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
                written = written_model.WrittenModel(
                    checkpoint, work.recipe, note.layers, note.rescaled
                )
                with torch_threads(count):
                    found = accuracy_check.check(
                        written, work, job.check, target, place, trust_remote_code, progress
                    )
                accuracy_check.limit(found, max_kl, output.folder)
                note = attrs.evolve(note, check=found)
            resume.check_unchanged(work.source, before)
            if ranks.first:
                note = _carded(job, note, output)
                output.text(filenames.MANIFEST, manifest.serialize(note))
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
    before: resume.Stamps,
    ranks: Ranks,
) -> Manifest:
    """Every file but the last two, proved."""
    work = job.plan
    told = progress(
        "compressing",
        work.source_bytes
        if job.data
        else sum(shard.source_bytes for shard in data_free.own(work, ranks)),
    )
    blocks: list[BlockNotes] = []
    if job.data:
        limit = None if max_memory is None else max_memory - TRANSFORMERS_BYTES
        with torch_threads(count):
            blocks = calibrated.write_shards(
                work, output, job.data, devices[0], limit, trust_remote_code, told, ranks
            )
    # tasks run side by side, each on one core: torch's own threads would only wait for each other
    with torch_threads(1):
        if not job.data:
            data_free.write_shards(work, output, count, devices, told, ranks)
        for name, origin in work.side_files.items() if ranks.first else ():
            output.copy(name, work.source.folder / origin)
        if work.index and ranks.first:
            output.text(INDEX, json_text(work.index))
        # whose faults would otherwise seem to be the output's
        resume.check_unchanged(work.source, before)
        ranks.wait()
        note = _note(job, output, count, verify, blocks, ranks)
        if verify:
            note = _prove(
                note,
                work,
                output,
                count,
                progress("verifying", work.output_bytes // ranks.count),
                ranks,
            )
    return note


def _carded(job: Job, note: Manifest, output: OutputFolder) -> Manifest:
    """The manifest with the model card, which is written."""
    work = job.plan
    origin = next(
        (name for name, source in work.side_files.items() if source == filenames.MODEL_CARD), None
    )
    made = model_card.RunDetails(
        job.command, work.source_bytes, work.output_bytes, work.source.folder, origin
    )
    content = model_card.render_card(note, made)
    output.text(filenames.MODEL_CARD, content)
    data = content.encode()
    files = {
        **note.files,
        filenames.MODEL_CARD: FileRecord(len(data), hashlib.sha256(data).hexdigest()),
    }
    return attrs.evolve(note, files=files)


def _threads(job: Job, max_memory: int | None, ranks: Ranks = ALONE) -> int:
    """As many as there are cores for a rank, or fewer where memory is short and each thread takes
    its own.
    """
    most = max(cores() // ranks.beside, 1)
    if job.data or max_memory is None:
        return most
    return next(
        (count for count in range(most, 1, -1) if estimate_memory(job.plan, count) <= max_memory), 1
    )


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
        if name not in ("config.json", filenames.MANIFEST, filenames.MODEL_CARD)
    }
    files = manifest.describe_files(written, threads, digests, ranks)
    files["config.json"] = FileRecord(len(config), hashlib.sha256(config).hexdigest())
    inputs = manifest.describe_files(
        {name: work.source.folder / name for name in work.source.headers}, threads, digests, ranks
    )
    errors = {name: error for block in found for name, error in block.errors.items()}
    tokens = {name: count for block in found for name, count in block.tokens.items()}
    layers = {
        module: LayerRecord(
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
    written = written_model.WrittenModel(checkpoint, work.recipe, note.layers, note.rescaled)
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
