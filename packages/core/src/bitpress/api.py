"""The Python API: what the command line does, as functions."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from bitpress.checkpoint import filenames
from bitpress.checkpoint.hub import resolve
from bitpress.checkpoint.reader import Reader, open_checkpoint
from bitpress.checkpoint.writer import OutputFolder, Permissions
from bitpress.compression.job import prepare_job
from bitpress.compression.run import run
from bitpress.compression.search import search as searching
from bitpress.compression.search.result import SearchResult
from bitpress.errors import OutputError
from bitpress.modeling.decoder import DecoderOptions
from bitpress.modeling.tokens import load_evaluation_text
from bitpress.output import (
    decompress as decompression,
    evaluate as evaluation,
    evaluation_memory,
    verify as verification,
)
from bitpress.output.file_proof import Workers
from bitpress.output.folder_proof import prove_folder
from bitpress.output.manifest import Check, Manifest, read_manifest
from bitpress.output.open_model import open_runnable_model
from bitpress.output.report.page import is_page, render_page
from bitpress.planning import arguments, evaluation_config
from bitpress.planning.arguments import Calibration, Settings, Texts
from bitpress.planning.calibration_config import CalibrationConfig
from bitpress.planning.evaluation_config import EvaluationConfig
from bitpress.planning.plan import Plan
from bitpress.planning.planner import make_plan
from bitpress.planning.recipe_source import RecipeSource
from bitpress.planning.recommendation import Recommendation, recommend as make_recommendation
from bitpress.planning.run_options import RunOptions
from bitpress.planning.search_goal import SearchGoal
from bitpress.runtime.devices import count_cores, find_all_devices, find_device, torch_threads
from bitpress.runtime.logger import log_warnings, warn
from bitpress.runtime.progress import Progress, choose_progress
from bitpress.schemes.deprecation import rename_keywords
from bitpress.schemes.hardware import Hardware
from bitpress.schemes.registry import discover
from bitpress.schemes.values import NORMAL_EFFORT

if TYPE_CHECKING:
    import torch


@rename_keywords({"recipe_file": "recipe", "device": "serve_on"})
# One keyword for each option of the command line.
def plan(  # noqa: PLR0913
    model: str | Path,
    *,
    scheme: str | None = None,
    recipe: str | Path | Mapping[str, Any] | None = None,
    settings: Settings = (),
    effort: str = NORMAL_EFFORT,
    ignore: Texts = (),
    copy: Texts = (),
    head: str | None = None,
    embeddings: str | None = None,
    more_bits: bool = False,
    serve_on: Hardware | str | None = None,
) -> Plan:
    """What `compress` would do, from headers alone.

    Args:
        model: a folder, or a Hub name.
        scheme: a scheme's name, or several joined by `+`; give this or `recipe`.
        recipe: a TOML file, or a table as it holds: `{"layers": [{"match", "steps"}]}`.
        settings: `[SCHEME.]OPTION=VALUE` texts, or a table such as `{"group_size": 64}`.
        effort: "low" (least data and time), "normal" or "high" (best rounding) in what is not set.
        ignore: patterns of layers to leave alone.
        copy: patterns of files to copy, beside those that loaders read.
        head, embeddings: schemes for these, which are then compressed too.
        more_bits: whether layers may get more bits than the source holds them in.
        serve_on: the device that will serve the result, or its name; None: the one present.

    Raises:
        BitpressError: the model, the recipe, or their combination cannot be carried out.
    """
    changes = settings, ignore, effort, head, embeddings, more_bits
    recipe_source = arguments.read_recipe_source(scheme, recipe, changes, copy)
    hardware = arguments.read_hardware("serve_on", serve_on)
    plan = plan_from(arguments.read_model("model", model), recipe_source, hardware)
    log_warnings((*plan.warnings, *plan.device_remarks))
    return plan


def plan_from(model: str | Path, recipe_source: RecipeSource, serve_on: Hardware | None) -> Plan:
    """`plan`, its options as a value."""
    recipe_source.require_one()
    source = open_checkpoint(resolve(model), copy=recipe_source.copy)
    return make_plan(source, recipe_source.resolve(discover()), serve_on)


def recommend(
    model: str | Path,
    *,
    serve_on: Hardware | str | None = None,
    memory: int | str | None = None,
    effort: str = NORMAL_EFFORT,
) -> Recommendation:
    """Which scheme to take for a model on a device, and what is against the others.

    Args:
        model: a folder, or a Hub name; only headers are read.
        serve_on: the device that will serve the result, or its name ("L4"); None: the one present.
        memory: bytes of that device, or a text such as "24GB"; None: everything is taken to fit.
        effort: the level at which schemes are compared.

    Raises:
        BitpressError: the model cannot be compressed, or no scheme is installed.
    """
    level, device = arguments.read_effort(effort), arguments.read_hardware("serve_on", serve_on)
    num_bytes = arguments.read_size("memory", memory)
    source = open_checkpoint(resolve(arguments.read_model("model", model)))
    return make_recommendation(source, discover(), device, num_bytes, level)


@rename_keywords({"recipe_file": "recipe"})
# One keyword for each option of the command line.
def compress(  # noqa: PLR0913
    model: str | Path,
    out: str | Path,
    *,
    scheme: str | None = None,
    recipe: str | Path | Mapping[str, Any] | None = None,
    settings: Settings = (),
    effort: str = NORMAL_EFFORT,
    ignore: Texts = (),
    copy: Texts = (),
    head: str | None = None,
    embeddings: str | None = None,
    more_bits: bool = False,
    calibration: Calibration = None,
    samples: int = CalibrationConfig().samples,
    sequence_length: int = CalibrationConfig().sequence_length,
    seed: int = 0,
    all_experts: bool = False,
    device: str | torch.device = "cpu",
    threads: int | None = None,
    max_memory: int | str | None = None,
    max_device_memory: int | str | None = None,
    trust_remote_code: bool = False,
    verify: bool = True,
    check: Calibration | bool = None,
    max_kl: float | None = None,
    serve_on: Hardware | str | None = None,
    base_model: str | None = None,
    progress: Progress | bool | None = None,
) -> Manifest:
    """Write a smaller model into the folder `out`, and prove it unless `verify` is off.

    An interrupted run resumes from its finished shards when it is started again. `config.json` is
    written last: without it no loader takes the folder for a model.

    Args:
        copy: patterns of files to copy, beside those that loaders read.
        head, embeddings: schemes for these, which are then compressed too.
        more_bits: whether layers may get more bits than the source holds them in.
        calibration: a .jsonl, .json, .txt or .parquet file, a folder of them, or a dataset's name;
            or a list of texts, or of rows as such files hold them. None takes the text that ships
            with bitpress.
        samples: how many sequences of `sequence_length` tokens are taken of it.
        all_experts: whether every expert is fitted to all of them, and not to those that its router
            sends to it.
        device: what computes: "auto" (a GPU where there is one), "cpu", "cuda" or "cuda:N"; the
            bytes written by schemes that need no data do not depend on `threads`.
        max_memory: bytes, or a text such as "4GB"; a run that would need more is refused, one that
            could use more for speed does not.
        max_device_memory: the same of a GPU, in a calibrated run; None: what is free there.
        trust_remote_code: whether code in the model's folder may run.
        check: a text on which the result is compared with its source; True: one that ships.
        max_kl: the most that their KL divergence may be there, in nats per token.
        serve_on: the device that will serve the result, or its name; None: the one present.
        base_model: the Hub name of a model in a folder, for the model card.
        progress: True shows bars, in a notebook too; or a function that is called with the name
            and the bytes of each stage, and returns one that is called with the bytes done.

    Returns:
        What `bitpress.json` holds. Its `warnings` are all that the run warned of: those that
        the file holds, and what the device that will serve it makes of the schemes.

    Raises:
        BitpressError: bad input, found before the work starts where headers show it.
        VerificationError: the written files are not what was planned, or predict too badly;
            `config.json` was not written. After the second the shards stay, and the same call with
            another `max_kl` resumes from them.
    """
    changes = settings, ignore, effort, head, embeddings, more_bits
    recipe_source = arguments.read_recipe_source(scheme, recipe, changes, copy)
    config = arguments.read_calibration_config(
        calibration, (samples, sequence_length, seed), CalibrationConfig(all_experts=all_experts)
    )
    options = attrs.evolve(
        arguments.read_run_options(device, threads, max_memory, trust_remote_code),
        max_device_memory=arguments.read_size("max_device_memory", max_device_memory),
        verify=arguments.read_flag("verify", verify),
        check=arguments.read_check(check),
        max_kl=None if max_kl is None else arguments.read_number("max_kl", max_kl),
        serve_on=arguments.read_hardware("serve_on", serve_on),
        base_model=base_model,
    )
    folder, progress = arguments.read_path("out", out), choose_progress(progress)
    job = prepare_job(arguments.read_model("model", model), recipe_source, config, options)
    log_warnings(job.plan.device_remarks)
    manifest = run(job, folder, options, progress)
    return attrs.evolve(manifest, warnings=(*manifest.warnings, *job.plan.device_remarks))


# One keyword for each option of the command line.
def search(  # noqa: PLR0913
    model: str | Path,
    out: str | Path,
    *,
    schemes: Texts,
    budget: float | str,
    cache_tokens: int = 0,
    settings: Settings = (),
    effort: str = NORMAL_EFFORT,
    ignore: Texts = (),
    calibration: Calibration = None,
    samples: int = searching.NUM_SEQUENCES,
    sequence_length: int = CalibrationConfig().sequence_length,
    seed: int = 0,
    all_experts: bool = False,
    device: str | torch.device = "cpu",
    threads: int | None = None,
    max_memory: int | str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | bool | None = None,
) -> SearchResult:
    """Measure what each scheme costs each layer, and write the recipe that costs least in a budget
    into the file `out`.

    Args:
        schemes: to choose from: NAME, or NAME:OPTION=VALUE:OPTION=VALUE, several steps joined by
            `+`; "none" leaves layers as they are.
        budget: stored bits per weight of the layers, scales included, to two decimals; or a size
            such as "4GB" of the whole model, whose head and embeddings are chosen for too.
        cache_tokens: whose keys and values a budget in bytes has room for too.
        settings: as for `compress`, whose other arguments mean the same here too.

    Raises:
        BitpressError: the model, a scheme or the texts cannot be used, no choice keeps to the
            budget, or `out` is there already.
    """
    goal = SearchGoal(
        arguments.read_texts("schemes", schemes),
        arguments.read_budget("budget", budget),
        arguments.read_count("cache_tokens", cache_tokens, 0),
        arguments.read_settings(settings),
        arguments.read_texts("ignore", ignore),
        arguments.read_effort(effort),
    )
    defaults = CalibrationConfig(samples=searching.NUM_SEQUENCES, all_experts=all_experts)
    size = (samples, sequence_length, seed)
    config = arguments.read_calibration_config(calibration, size, defaults)
    options = arguments.read_run_options(device, threads, max_memory, trust_remote_code)
    file, progress = arguments.read_path("out", out), choose_progress(progress)
    name = arguments.read_model("model", model)
    job = searching.prepare_search(name, file, goal, config, options)
    log_warnings(job.calibration.warnings)
    return searching.run_search(job, file, options, progress)


# One keyword for each option of the command line.
def verify(  # noqa: PLR0913
    out: str | Path,
    against: str | Path | None = None,
    threads: int | None = None,
    progress: Progress | bool | None = None,
    engine: bool = False,
    *,
    device: str | torch.device = "cpu",
) -> verification.VerificationReport:
    """Read an output back, and prove files, config, scales and, `against` its source, weights.

    Args:
        engine: whether the vLLM of this environment is asked too.
        device: decodes and compares what is stored; "cuda" is every GPU.

    Raises:
        BitpressError: the folder was not written by bitpress, or a scheme that wrote it is not
            installed.
    """
    source = None if against is None else arguments.read_model("against", against)
    folder, progress = arguments.read_path("out", out), choose_progress(progress)
    devices = find_all_devices(arguments.read_device(device))
    workers = Workers(arguments.read_threads(threads) or count_cores(), devices=devices)
    return prove_folder(folder, source, workers, progress, engine)


def inspect(out: str | Path) -> Manifest:
    """What is inside an output: schemes, bits per weight, error per layer."""
    return read_manifest(arguments.read_path("out", out))


def report(out: str | Path, file: str | Path | None = None) -> Path:
    """Write one self-contained HTML page about an output; returns where: `file`, or the folder's
    own name with .html beside it.

    Raises:
        BitpressError: the folder was not written by bitpress, or `file` is there and no page.
    """
    folder = arguments.read_path("out", out)
    name = folder.resolve().name
    beside = folder.resolve().with_name(f"{name}.html")
    target = beside if file is None else arguments.read_path("file", file)
    if target.exists() and not is_page(target):
        raise OutputError(f"{target} is there and no page: name another file (--html)")
    content = render_page(read_manifest(folder), name)
    permissions = Permissions.of(folder, [filenames.MANIFEST])
    OutputFolder(target.absolute().parent, permissions).write_text(target.name, content)
    return target


def decompress(out: str | Path, dense: str | Path, progress: Progress | bool | None = None) -> None:
    """Write the plain checkpoint that an output, or a model in fewer than 16 bits, stands for."""
    folder, target = arguments.read_path("out", out), arguments.read_path("dense", dense)
    decompression.decompress(folder, target, choose_progress(progress))


# One keyword for each option of the command line.
def evaluate(  # noqa: PLR0913
    model: str | Path,
    text: Calibration = None,
    against: str | Path | None = None,
    *,
    sequence_length: int = evaluation_config.SEQUENCE_LENGTH,
    max_tokens: int = evaluation_config.MAX_TOKENS,
    device: str | torch.device = "cpu",
    threads: int | None = None,
    max_memory: int | str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | bool | None = None,
) -> Check:
    """How well a model predicts a text; and with `against`, how far its predictions are from that
    model's.

    Args:
        model: a plain model, or one that bitpress wrote: it is run as it will be served,
            activations quantized.
        text: as the calibration of `compress`; None: a text that ships with bitpress.
        against: as `model`; usually its source.

    Raises:
        BitpressError: the text, or a model, cannot be used.
    """
    config = EvaluationConfig(
        arguments.read_source("text", text) or evaluation_config.CHECK_TEXT,
        arguments.read_count("sequence_length", sequence_length, evaluation_config.SEQUENCE_LENGTH),
        arguments.read_count("max_tokens", max_tokens, evaluation_config.MAX_TOKENS),
    )
    options = arguments.read_run_options(device, threads, max_memory, trust_remote_code)
    name = arguments.read_model("model", model)
    other = None if against is None else arguments.read_model("against", against)
    return evaluate_model(name, other, config, options, choose_progress(progress))


def evaluate_model(
    model: str | Path,
    against: str | Path | None,
    config: EvaluationConfig,
    options: RunOptions,
    progress: Progress,
) -> Check:
    """`evaluate`, its options as values."""
    device, num_threads = find_device(options.device), options.num_threads or count_cores()
    trusts_code = options.trust_remote_code
    with Reader(pinned=device.type != "cpu") as reader, torch_threads(num_threads):
        folders = [resolve(model)] if against is None else [resolve(model), resolve(against)]
        models = [open_runnable_model(folder, reader) for folder in folders]
        # texts are tokenized as the reference tokenizes them, where there is one
        source = models[-1].checkpoint
        tokens = load_evaluation_text(config, source.folder, source.config, trusts_code)
        for text in tokens.warnings:
            warn(text, stacklevel=2)
        input_ids, folder = tokens.input_ids, Path(tempfile.gettempdir())
        states_folder = evaluation_memory.choose_folder(
            models, input_ids, options.max_memory, folder
        )
        brought_bytes = evaluation_memory.choose_brought_bytes(models, input_ids.shape[1], device)
        check = evaluation.evaluate(
            models,
            tokens,
            DecoderOptions(device, trust_remote_code=trusts_code, max_brought_bytes=brought_bytes),
            states_folder,
            progress("evaluating", evaluation.count_bytes(models)),
        )
        return attrs.evolve(check, warnings=tokens.warnings)
