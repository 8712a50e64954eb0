"""The Python API: what the command line does, as functions."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from bitpress.checkpoint import filenames
from bitpress.checkpoint.hub import resolve
from bitpress.checkpoint.reader import Reader, open_checkpoint
from bitpress.checkpoint.source import fuse_uncompressed_experts, resolve_source
from bitpress.checkpoint.writer import OutputFolder, Permissions
from bitpress.compression.job import prepare_job
from bitpress.compression.run import run
from bitpress.compression.search import search as searching
from bitpress.compression.search.result import SearchResult
from bitpress.errors import CheckpointError, DataError, Fault, OutputError
from bitpress.modeling.decoder import DecoderOptions
from bitpress.modeling.tokens import load_evaluation_text
from bitpress.output import (
    evaluate as evaluation,
    file_proof,
    manifest as manifests,
    verify as verification,
)
from bitpress.output.decompress import write_dense
from bitpress.output.engine_check import find_engine_faults
from bitpress.output.file_proof import Workers
from bitpress.output.manifest import Check, Manifest, read_manifest
from bitpress.output.open_model import open_runnable_model, open_written, read_written
from bitpress.output.report.page import DOCTYPE, render_page
from bitpress.planning.calibration_config import CalibrationConfig
from bitpress.planning.evaluation_config import MAX_TOKENS, SEQUENCE_LENGTH, EvaluationConfig
from bitpress.planning.plan import Plan
from bitpress.planning.planner import make_plan
from bitpress.planning.recipe_source import RecipeSource
from bitpress.planning.recommendation import Recommendation, recommend as make_recommendation
from bitpress.planning.run_options import RunOptions
from bitpress.planning.search_goal import SearchGoal
from bitpress.runtime.devices import count_cores, find_device, torch_threads
from bitpress.runtime.progress import Progress, ignore_progress
from bitpress.schemes import hardware
from bitpress.schemes.deprecation import warn_renamed
from bitpress.schemes.hardware import Hardware
from bitpress.schemes.registry import discover


# One keyword for each option of the command line.
def plan(  # noqa: PLR0913
    model: str | Path,
    *,
    scheme: str | None = None,
    recipe_file: str | Path | None = None,
    settings: Iterable[str] = (),
    ignore: Iterable[str] = (),
    copy: Iterable[str] = (),
    serve_on: Hardware | str | None = None,
    device: Hardware | None = None,
) -> Plan:
    """What `compress` would do, from headers alone.

    Args:
        model: a folder, or a Hub name.
        scheme: a scheme's name, or several joined by `+`; give this or `recipe_file`.
        settings: `[SCHEME.]OPTION=VALUE` texts.
        ignore: patterns of layers to leave alone.
        copy: patterns of files to copy, beside those that loaders read.
        serve_on: the device that will serve the result, or its name; None: the one present.
        device: the old name of `serve_on`.

    Raises:
        BitpressError: the model, the recipe, or their combination cannot be carried out.
    """
    recipe_source = RecipeSource(
        scheme, _to_path(recipe_file), tuple(settings), tuple(ignore), tuple(copy)
    )
    if device is not None:
        warn_renamed("bitpress.plan(device=...)", "bitpress.plan(serve_on=...)")
    return plan_from(model, recipe_source, _to_hardware(serve_on or device))


def _to_hardware(device: Hardware | str | None) -> Hardware | None:
    return hardware.find_device(device) if isinstance(device, str) else device


def plan_from(model: str | Path, recipe_source: RecipeSource, serve_on: Hardware | None) -> Plan:
    """`plan`, its options as a value."""
    recipe_source.require_one()
    source = open_checkpoint(resolve(model), copy=recipe_source.copy)
    return make_plan(source, recipe_source.resolve(discover()), serve_on)


def recommend(
    model: str | Path,
    *,
    serve_on: Hardware | str | None = None,
    memory: int | None = None,
) -> Recommendation:
    """Which scheme to take for a model on a device, and what is against the others.

    Args:
        model: a folder, or a Hub name; only headers are read.
        serve_on: the device that will serve the result, or its name ("L4"); None: the one present.
        memory: bytes of that device; None: everything is taken to fit.

    Raises:
        BitpressError: the model cannot be compressed, or no scheme is installed.
    """
    source = open_checkpoint(resolve(model))
    return make_recommendation(source, discover(), _to_hardware(serve_on), memory)


# One keyword for each option of the command line.
def compress(  # noqa: PLR0913
    model: str | Path,
    out: str | Path,
    *,
    scheme: str | None = None,
    recipe_file: str | Path | None = None,
    settings: Iterable[str] = (),
    ignore: Iterable[str] = (),
    copy: Iterable[str] = (),
    calibration: str | Path | Iterable[str | Mapping[str, Any]] | None = None,
    samples: int = CalibrationConfig().samples,
    sequence_length: int = CalibrationConfig().sequence_length,
    seed: int = 0,
    all_experts: bool = False,
    device: str = "cpu",
    threads: int | None = None,
    max_memory: int | None = None,
    trust_remote_code: bool = False,
    verify: bool = True,
    check: str | Path | None = None,
    max_kl: float | None = None,
    serve_on: Hardware | str | None = None,
    progress: Progress = ignore_progress,
) -> Manifest:
    """Write a smaller model into the folder `out`, and prove it unless `verify` is off.

    An interrupted run resumes from its finished shards when it is started again. `config.json` is
    written last: without it no loader takes the folder for a model.

    Args:
        copy: patterns of files to copy, beside those that loaders read.
        calibration: a .jsonl, .json, .txt or .parquet file, a folder of them, or a dataset's name;
            or a list of texts, or of rows as such files hold them. None takes the text that ships
            with bitpress.
        samples: how many sequences of `sequence_length` tokens are taken of it.
        all_experts: whether every expert is fitted to all of them, and not to those that its router
            sends to it.
        device: what computes: "auto" (a GPU where there is one), "cpu", "cuda" or "cuda:N"; the
            bytes written by schemes that need no data do not depend on `threads`.
        max_memory: bytes; a run that would need more is refused, one that could use more for speed
            does not.
        trust_remote_code: whether code in the model's folder may run.
        check: a text on which the result, run as it will be served, is compared with its source.
        max_kl: the most that their KL divergence may be there, in nats per token.
        serve_on: the device that will serve the result, or its name; None: the one present.

    Raises:
        BitpressError: bad input, found before the work starts where headers show it.
        VerificationError: the written files are not what was planned, or predict too badly;
            `config.json` was not written. After the second the shards stay, and the same call with
            another `max_kl` resumes from them.
    """
    recipe_source = RecipeSource(
        scheme, _to_path(recipe_file), tuple(settings), tuple(ignore), tuple(copy)
    )
    config = CalibrationConfig(_to_source(calibration), samples, sequence_length, seed, all_experts)
    options = RunOptions(
        device,
        threads,
        max_memory,
        verify,
        _to_text(check),
        max_kl,
        trust_remote_code,
        _to_hardware(serve_on),
    )
    job = prepare_job(model, recipe_source, config, options)
    return run(job, out, options, progress)


# One keyword for each option of the command line.
def search(  # noqa: PLR0913
    model: str | Path,
    out: str | Path,
    *,
    schemes: Sequence[str],
    budget: float,
    settings: Iterable[str] = (),
    ignore: Iterable[str] = (),
    calibration: str | Path | Iterable[str | Mapping[str, Any]] | None = None,
    samples: int = searching.NUM_SEQUENCES,
    sequence_length: int = CalibrationConfig().sequence_length,
    seed: int = 0,
    all_experts: bool = False,
    device: str = "cpu",
    threads: int | None = None,
    max_memory: int | None = None,
    trust_remote_code: bool = False,
    progress: Progress = ignore_progress,
) -> SearchResult:
    """Measure what each scheme costs each layer, and write the recipe that costs least in a budget
    into the file `out`.

    Args:
        schemes: to choose from: NAME, or NAME:OPTION=VALUE:OPTION=VALUE, several steps joined by
            `+`; "none" leaves layers as they are.
        budget: stored bits per weight of the layers, scales included, to two decimals.
        settings: as for `compress`, whose other arguments mean the same here too.

    Raises:
        BitpressError: the model, a scheme or the texts cannot be used, no choice keeps to the
            budget, or `out` is there already.
    """
    goal = SearchGoal(tuple(schemes), budget, tuple(settings), tuple(ignore))
    config = CalibrationConfig(_to_source(calibration), samples, sequence_length, seed, all_experts)
    options = RunOptions(device, threads, max_memory, trust_remote_code=trust_remote_code)
    job = searching.prepare_search(model, out, goal, config, options)
    return searching.run_search(job, out, options, progress)


def _to_path(file: str | Path | None) -> Path | None:
    return None if file is None else Path(file)


def _to_text(file: str | Path | None) -> str | None:
    return None if file is None else str(file)


def _to_source(
    calibration: str | Path | Iterable[str | Mapping[str, Any]] | None,
) -> str | tuple[str | Mapping[str, Any], ...] | None:
    if calibration is None or isinstance(calibration, (str, Path)):
        return _to_text(calibration)
    if isinstance(calibration, Mapping) or not isinstance(calibration, Iterable):
        raise DataError(
            "calibration: a file, a dataset's name, or a list of texts or rows is expected, not "
            f"{type(calibration).__name__}"
        )
    return tuple(calibration)


def verify(
    out: str | Path,
    against: str | Path | None = None,
    threads: int | None = None,
    progress: Progress = ignore_progress,
    engine: bool = False,
) -> verification.VerificationReport:
    """Open an output again and prove it: files, config, scales, and with `against`, the source,
    every weight.

    Args:
        engine: whether the vLLM of this environment is asked too.

    Raises:
        BitpressError: the folder was not written by bitpress, or a scheme that wrote it is not
            installed.
    """
    folder, num_threads = Path(out), threads or count_cores()
    if (folder / filenames.MANIFEST).is_file() and not manifests.is_intact(folder):
        fault = (
            "its bytes are not those that were written (its own SHA-256 differs), and it is what "
            "the rest is proved by"
        )
        return verification.VerificationReport((Fault(filenames.MANIFEST, fault),), {})
    manifest = read_manifest(folder)
    source = None
    if against is not None:
        resolved = resolve_source(open_checkpoint(resolve(against)))
        source = fuse_uncompressed_experts(resolved, manifest.layers)
    # files are read, and then their layers
    num_bytes = sum(2 * record.bytes for name, record in manifest.files.items() if record.header)
    workers = Workers(num_threads, progress("verifying", num_bytes))
    with torch_threads(1):
        _, faults = file_proof.verify_files(manifest.files, folder, workers)
        faults += file_proof.find_added_files(manifest.files, folder)
        try:
            checkpoint = open_checkpoint(folder)
        except CheckpointError as e:
            return verification.VerificationReport((*faults, Fault("", str(e))), {})
        written = read_written(manifest, checkpoint)
        report = verification.verify_tensors(written, source, workers)
        if source is not None:
            faults += file_proof.find_source_differences(
                manifest.files, folder, checkpoint.config, source
            )
    faults += report.faults
    if engine and not faults:
        faults += find_engine_faults(folder)
    remarks: tuple[str, ...] = ()
    if any(file.sha256 is None and file.header is None for file in manifest.files.values()):
        remarks = (
            "it was written with --no-verify by an earlier version: there are no digests by which "
            "a changed byte would be found",
        )
    return attrs.evolve(report, faults=tuple(dict.fromkeys(faults)), remarks=remarks)


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
    name = folder.resolve().name
    target = folder.resolve().with_name(f"{name}.html") if file is None else Path(file)
    if target.exists() and not _is_page(target):
        raise OutputError(f"{target} is there and no page: name another file (--html)")
    content = render_page(read_manifest(folder), name)
    permissions = Permissions.of(folder, [filenames.MANIFEST])
    OutputFolder(target.absolute().parent, permissions).write_text(target.name, content)
    return target


def _is_page(file: Path) -> bool:
    if not file.is_file():
        return False
    with file.open("rb") as f:
        return f.read(len(DOCTYPE)) == DOCTYPE.encode()


def decompress(out: str | Path, dense: str | Path, progress: Progress = ignore_progress) -> None:
    """Write the plain checkpoint that an output's loader computes with."""
    checkpoint = open_checkpoint(Path(out))
    # what --copy took from the source goes back
    files = read_manifest(checkpoint.folder).files
    copied = [name for name in checkpoint.left_files if name in files]
    written = open_written(checkpoint.with_side_files(copied))
    # in two bytes a weight, as most sources have them
    num_bytes = sum(2 * record.shape[0] * record.shape[1] for record in written.layers.values())
    permissions = Permissions.of(written.checkpoint.folder, written.checkpoint.headers)
    with torch_threads(1), OutputFolder(Path(dense), permissions) as output:
        write_dense(written, output, progress("decompressing", num_bytes))


# One keyword for each option of the command line.
def evaluate(  # noqa: PLR0913
    model: str | Path,
    text: str | Path,
    against: str | Path | None = None,
    *,
    sequence_length: int = SEQUENCE_LENGTH,
    max_tokens: int = MAX_TOKENS,
    device: str = "cpu",
    threads: int | None = None,
    max_memory: int | None = None,
    trust_remote_code: bool = False,
    progress: Progress = ignore_progress,
) -> Check:
    """How well a model predicts a text; and with `against`, how far its predictions are from that
    model's.

    Args:
        model: a plain model, or one that bitpress wrote: it is run as it will be served,
            activations quantized.
        text: a .jsonl, .txt or .parquet file.
        against: as `model`; usually its source.

    Raises:
        BitpressError: the text, or a model, cannot be used.
    """
    config = EvaluationConfig(str(text), sequence_length, max_tokens)
    options = RunOptions(device, threads, max_memory, trust_remote_code=trust_remote_code)
    return evaluate_model(model, against, config, options, progress)


def evaluate_model(
    model: str | Path,
    against: str | Path | None,
    config: EvaluationConfig,
    options: RunOptions,
    progress: Progress,
) -> Check:
    """`evaluate`, its options as values."""
    device = find_device(options.device)
    with Reader() as reader, torch_threads(options.num_threads or count_cores()):
        folders = [resolve(model)] if against is None else [resolve(model), resolve(against)]
        models = [open_runnable_model(folder, reader) for folder in folders]
        # texts are tokenized as the reference tokenizes them, where there is one
        tokenizer_source = models[-1].checkpoint
        tokens = load_evaluation_text(
            config,
            tokenizer_source.folder,
            tokenizer_source.config,
            options.trust_remote_code,
        )
        for text in tokens.warnings:
            warnings.warn(text, stacklevel=2)
        hidden_states_folder = evaluation.choose_folder(
            models, tokens.input_ids, options.max_memory, Path(tempfile.gettempdir())
        )
        return evaluation.evaluate(
            models,
            tokens,
            DecoderOptions(device, trust_remote_code=options.trust_remote_code),
            hidden_states_folder,
            progress("evaluating", evaluation.count_bytes(models)),
        )
