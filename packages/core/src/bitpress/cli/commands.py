"""The commands: each hands values on to `api` or `compression`, and shows a summary. Torch is
imported only where work is done.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import click

from bitpress.cli import options
from bitpress.cli.click_classes import Commands
from bitpress.cli.completion import complete_candidate, complete_file, complete_scheme
from bitpress.cli.computing_device import choose_rank_device, resolve_device
from bitpress.cli.output import CompressSummary, EvalSummary, InspectSummary, VerifySummary
from bitpress.cli.plan_output import DeviceMemory, PlanSummary, Requirements, print_remarks
from bitpress.cli.recommend_output import RecommendSummary
from bitpress.cli.scheme_output import RegistrySummary, SchemeSummary
from bitpress.cli.search_output import SearchSummary
from bitpress.cli.source_output import SourceSummary
from bitpress.cli.text import (
    garbage_collection_paused,
    print_notes,
    progress_bars,
    say,
    show,
    warn,
)
from bitpress.errors import VerificationError
from bitpress.planning.arguments import read_budget
from bitpress.planning.calibration_config import CalibrationConfig
from bitpress.planning.evaluation_config import CHECK_TEXT, EvaluationConfig
from bitpress.planning.recipe_source import RecipeSource
from bitpress.planning.run_options import RunOptions
from bitpress.planning.search_goal import SearchGoal
from bitpress.schemes.hardware import DEVICES, Hardware
from bitpress.schemes.registry import discover

if TYPE_CHECKING:
    from bitpress.planning.plan import Plan


@click.group(
    cls=Commands,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
)
@click.option("--version", "show_version", is_flag=True, help="Print the version.")
@click.pass_context
def app(context: click.Context, show_version: bool) -> None:
    """Compress the checkpoints of large language models for vLLM and transformers."""
    if show_version:
        from bitpress.runtime.version import __version__
        from bitpress.schemes.hookspecs import VERSION

        say(f"bitpress {__version__} (hooks {VERSION})")
        context.exit()
    elif context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
@options.argument(
    "name",
    "[NAME]",
    "Show the options and devices of one scheme.",
    required=False,
    shell_complete=complete_scheme,
)
@options.serve_on("Show one device only, for example A100.", old_name="--device")
@options.as_json
def schemes(name: str | None, serve_on: Hardware | None) -> None:
    """List the installed schemes, or show one with its devices."""
    registry = discover()
    devices = tuple(DEVICES) if serve_on is None else (serve_on,)
    if name is None:
        show(RegistrySummary(registry, devices))
    else:
        show(SchemeSummary(registry.get(name).step(), devices))


@app.command()
@options.model
@options.recipe
@options.calibration_size(256)
@options.deployment
@options.lists_all
@options.as_json
@options.collect(recipe=RecipeSource, calibration=CalibrationConfig, deployment=options.Deployment)
def plan(
    model: str,
    lists_all: bool,
    recipe: RecipeSource,
    calibration: CalibrationConfig,
    deployment: options.Deployment,
) -> None:
    """Show what a run would do. It reads only the headers of the model's files."""
    with garbage_collection_paused():
        from bitpress import api
        from bitpress.planning import effort, memory_estimate, tensor_parallel, time_estimate
        from bitpress.runtime.devices import count_cores

    plan = api.plan_from(model, recipe, deployment.serve_on)

    calibration.require_valid()
    shares = time_estimate.estimate_ranks(plan, deployment.world_size, calibration)
    num_threads = deployment.num_threads or max(count_cores() // deployment.world_size, 1)

    def estimate_seconds(plan: Plan) -> float:
        ranks = time_estimate.estimate_ranks(plan, deployment.world_size, calibration)
        return time_estimate.estimate_seconds(ranks, num_threads)

    num_tokens, device_memory = max(share.tokens for share in shares), None
    if plan.calibrated:
        length = calibration.shape[1]
        device_memory = DeviceMemory(
            memory_estimate.estimate_device(plan, num_tokens, length),
            memory_estimate.estimate_device(plan, num_tokens, length, by_layer=True).on_disk,
        )
    requirements = Requirements(
        memory_estimate.estimate_memory(plan, num_threads, calibration.shape),
        memory_estimate.estimate_scratch(plan, num_tokens),
        device_memory,
        tuple(shares),
        num_threads,
        time_estimate.estimate_seconds(shares, num_threads),
        effort.compare_efforts(plan, recipe, discover(), estimate_seconds),
    )
    remarks = tuple(tensor_parallel.remarks(plan, deployment.tensor_parallel))
    show(PlanSummary(plan, requirements, deployment.tensor_parallel, remarks, lists_all))


@app.command()
@options.model
@options.serve_on("Device that will serve it, for example L4 (default: this machine's).")
@options.device_memory
@options.effort
@options.as_json
def recommend(model: str, serve_on: Hardware | None, memory: int | None, effort: str) -> None:
    """Say which scheme to take for a device, and why. It reads only the headers of the model's
    files. If nothing fits, the exit code is 1.
    """
    with garbage_collection_paused():
        from bitpress import api

    recommendation = api.recommend(model, serve_on=serve_on, memory=memory, effort=effort)
    show(RecommendSummary(recommendation, model))
    if recommendation.best is None:
        hint = ""
        if any(out.cause == "memory" for out in recommendation.rejected):
            hint = "; a device with more memory may, or several (vllm's --tensor-parallel-size)"
        raise VerificationError(
            f"{model}: {recommendation.device.name} serves it with no installed scheme{hint}"
        )


@app.command()
@options.model
@options.argument(
    "out",
    "OUT",
    "A new or empty folder to write, or that of an interrupted run.",
    type=options.FILE,
)
@options.recipe
@options.calibration(256)
@options.serve_on("Device that will serve the result (default: this machine's).")
@options.machine
@options.devices
@options.max_device_memory
@options.proof
@options.base_model
@options.verbosity
@options.as_json
@options.collect(recipe=RecipeSource, calibration=CalibrationConfig, run_options=RunOptions)
# As many arguments as the command has values.
def compress(  # noqa: PLR0913, PLR0917
    model: str,
    out: Path,
    recipe: RecipeSource,
    devices: str | None,
    calibration: CalibrationConfig,
    run_options: RunOptions,
) -> None:
    """Compress a model into a new folder, and verify it."""
    with garbage_collection_paused():
        from bitpress.compression.job import prepare_job
        from bitpress.compression.run import run
        from bitpress.planning import tensor_parallel
        from bitpress.runtime import watchdog

    run_options, device_line = resolve_device(run_options)
    if devices is not None:
        run_options = attrs.evolve(run_options, device=choose_rank_device(devices))
    has_reporter = devices is not None
    with watchdog.join_process_group(run_options.device, has_reporter) as process_group:
        job = prepare_job(model, recipe, calibration, run_options)
        if process_group.is_rank_zero:
            print_notes(device_line)
            print_remarks(job.plan, job.warnings, tensor_parallel.remarks(job.plan))
        with progress_bars(is_silent=not process_group.is_rank_zero) as progress:
            manifest = run(job, out, run_options, progress, process_group)
    if process_group.is_rank_zero:
        show(CompressSummary(manifest, job, out, run_options.verify))


@app.command()
@options.model
@click.option(
    "--schemes",
    metavar="NAME,NAME",
    required=True,
    callback=lambda context, parameter, text: tuple(name.strip() for name in text.split(",")),
    shell_complete=complete_candidate,
    help="Choices for each layer: NAME, NAME:OPTION=VALUE, or none.",
)
@click.option(
    "--budget",
    metavar="BUDGET",
    callback=lambda context, parameter, text: read_budget("--budget", text),
    required=True,
    help="Mean number of stored bits per weight (4.5), or a size of the whole model (4GB).",
)
@click.option(
    "--cache-tokens",
    metavar="N",
    type=click.IntRange(min=0),
    default=0,
    help="Tokens whose keys and values a budget in bytes has room for too.",
)
@click.option(
    "--out", metavar="FILE", type=options.FILE, default="recipe.toml", help="The recipe to write."
)
@options.settings
@options.calibration(64)
@options.machine
@options.verbosity
@options.as_json
@options.collect(goal=SearchGoal, calibration=CalibrationConfig, run_options=RunOptions)
def search(
    model: str,
    out: Path,
    goal: SearchGoal,
    calibration: CalibrationConfig,
    run_options: RunOptions,
) -> None:
    """Write the recipe with the least expected loss within a budget."""
    with garbage_collection_paused():
        from bitpress.compression.search.search import prepare_search, run_search

    run_options, device_line = resolve_device(run_options)
    job = prepare_search(model, out, goal, calibration, run_options)
    print_notes(job.notes + device_line)
    warn(job.calibration.warnings)
    with progress_bars() as progress:
        result = run_search(job, out, run_options, progress)
    show(SearchSummary(result, out))


@app.command()
@options.out
@click.option(
    "--against",
    metavar="MODEL",
    shell_complete=complete_file,
    help="The source to compare the weights with.",
)
@click.option(
    "--engine", "ask_engine", is_flag=True, help="Let the installed vLLM place the tensors too."
)
@options.device
@options.threads
@options.verbosity
@options.as_json
@options.collect(run_options=RunOptions)
def verify(out: Path, against: str | None, ask_engine: bool, run_options: RunOptions) -> None:
    """Read an output back and check its files. If something is wrong, the exit code is 1."""
    with garbage_collection_paused():
        from bitpress import api

    run_options, device_line = resolve_device(run_options)
    print_notes(device_line)
    num_threads, device = run_options.num_threads, run_options.device
    with progress_bars() as progress:
        report = api.verify(out, against, num_threads, progress, ask_engine, device=device)
    warn(report.remarks)
    show(VerifySummary(report, out, against))
    if report.faults:
        raise VerificationError(f"{out}: {len(report.faults)} faults", report.faults)


@app.command("eval")
@options.model
@click.option(
    "--text",
    metavar="FILE",
    default=CHECK_TEXT,
    show_default="a text that ships",
    shell_complete=complete_file,
    help="Text to predict: a .txt, .jsonl or .parquet file.",
)
@click.option(
    "--against",
    metavar="REFERENCE",
    shell_complete=complete_file,
    help="The model to compare the predictions with.",
)
@options.sequence_length
@options.number("--max-tokens", "Tokens to take from the start of the text.", 65536)
@options.machine
@options.verbosity
@options.as_json
@options.collect(config=EvaluationConfig, run_options=RunOptions)
def evaluate(
    model: str, against: str | None, config: EvaluationConfig, run_options: RunOptions
) -> None:
    """Measure perplexity on a text. With --against, also KL divergence and top-1 agreement."""
    with garbage_collection_paused():
        from bitpress import api

    run_options, device_line = resolve_device(run_options)
    print_notes(device_line)
    with progress_bars() as progress:
        check = api.evaluate_model(model, against, config, run_options, progress)
    show(EvalSummary(check, model, against))


@app.command()
@options.out
@options.lists_all
@options.as_json
def inspect(out: Path, lists_all: bool) -> None:
    """Show the schemes, bits and errors of an output's layers, or the bits of a quantized model."""
    with garbage_collection_paused():
        from bitpress import api
        from bitpress.output.source_proof import describe_source, open_source

    if source := open_source(out):
        show(SourceSummary(describe_source(source), lists_all))
    else:
        show(InspectSummary(api.inspect(out), lists_all))


@app.command()
@options.out
@click.option(
    "--html",
    "file",
    metavar="FILE",
    type=options.FILE,
    help="The page to write (default: OUT.html beside OUT).",
)
def report(out: Path, file: Path | None) -> None:
    """Write an HTML page about an output. It shows sizes, errors, devices and the origin."""
    with garbage_collection_paused():
        from bitpress import api

    say(f"{api.report(out, file)}: written")


@app.command()
@options.out
@options.argument("dense", "DENSE", "The folder to write.", type=options.FILE)
@options.verbosity
def decompress(out: Path, dense: Path) -> None:
    """Write an output's dequantized weights as a plain checkpoint."""
    with garbage_collection_paused():
        from bitpress import api

    with progress_bars() as progress:
        api.decompress(out, dense, progress)
    say(f"{dense}: written")


@app.command("new-scheme")
@options.argument("name", "NAME", "Name of the new scheme.")
def new_scheme(name: str) -> None:
    """Write a package for a new scheme, bitpress-scheme-NAME."""
    from bitpress.schemes import template

    folder = template.write_package(name, Path())
    say(
        f"{folder}: written; edit {template.module_name(name)}.py there, and try it: pip install "
        "-e '.[test]' && pytest"
    )
