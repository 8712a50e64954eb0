"""The commands. They parse, call `run` or `outputs`, and show; torch is imported only where work is
done.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import attrs
import click

from bitpress.cli import options, output, plan_output, text as cli_text
from bitpress.errors import VerificationError
from bitpress.schemes import hardware
from bitpress.schemes.registry import discover


@click.group(
    cls=options.Commands,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
)
@click.option("--version", "show_version", is_flag=True, help="Print the version.")
@click.pass_context
def app(context: click.Context, show_version: bool) -> None:
    """Makes language models on disk smaller, for vLLM and transformers."""
    if show_version:
        from bitpress.runtime.version import __version__
        from bitpress.schemes.hookspecs import VERSION

        print(f"bitpress {__version__} (hooks {VERSION})")
        context.exit()
    elif context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
@options.argument("name", "[NAME]", "Show one scheme's options and hardware.", required=False)
@click.option("--device", metavar="NAME", help="Only what concerns one device: A100.")
@options.as_json
def schemes(name: str | None, device: str | None, as_json: bool) -> None:
    """List installed schemes, or show one with its options and the hardware it serves on."""
    registry = discover()
    devices = hardware.KNOWN if device is None else (hardware.find(device),)
    if name is not None:
        step = registry.get(name).step()
        cli_text.document(output.scheme_json(step, devices)) if as_json else output.scheme(
            step, devices
        )
    else:
        cli_text.document(output.registry_json(registry, devices)) if as_json else output.registry(
            registry, devices
        )


@app.command()
@options.model
@options.recipe
@click.option(
    "--tensor-parallel",
    "ranks",
    metavar="N",
    default=1,
    help="Ranks of the engine that will serve it.",
)
@click.option(
    "--hardware",
    "device",
    metavar="NAME",
    help="What will serve it: H100 (default: this machine's).",
)
@click.option(
    "--world-size",
    "count",
    metavar="N",
    type=click.IntRange(min=1),
    default=1,
    help="Processes that torchrun starts to do it.",
)
@options.threads
@options.as_json
def plan(
    model: str,
    scheme: str | None,
    recipe: Path | None,
    settings: Sequence[str],
    ignore: Sequence[str],
    ranks: int,
    device: str | None,
    count: int,
    threads: int | None,
    as_json: bool,
) -> None:
    """Show what would be done, from headers alone."""
    with cli_text.uncollected():
        from bitpress import api
        from bitpress.planning import memory_estimate, tensor_parallel, time_estimate
        from bitpress.runtime.devices import cores

    served = None if device is None else hardware.find(device)
    work = api.plan(
        model, scheme=scheme, recipe_file=recipe, settings=settings, ignore=ignore, device=served
    )
    shares, threads = (
        time_estimate.estimate_ranks(work, count),
        threads or max(cores() // count, 1),
    )
    found = plan_output.Needs(
        memory_estimate.estimate_memory(work, threads),
        memory_estimate.estimate_scratch(work, max(share.tokens for share in shares)),
        ranks,
        tuple(tensor_parallel.remarks(work, ranks)),
        tuple(shares),
        threads,
        time_estimate.estimate_seconds(shares, threads),
    )
    cli_text.document(plan_output.as_json(work, found)) if as_json else plan_output.table(
        work, found
    )


@app.command()
@options.model
@options.argument(
    "out", "OUT", "The folder to write; it must not hold anything else.", type=options.FILE
)
@options.recipe
@options.texts(256)
@options.machine
@click.option(
    "--check", metavar="TEXT", help="Compare the result's predictions of a text with its source's."
)
@click.option("--max-kl", metavar="X", type=float, help="Exit 1 if they differ by more nats.")
@click.option(
    "--no-verify", is_flag=True, help="Do not open and prove what was written; no digests."
)
@options.as_json
def compress(
    model: str,
    out: Path,
    scheme: str | None,
    recipe: Path | None,
    settings: Sequence[str],
    ignore: Sequence[str],
    calibration: str | None,
    samples: int,
    sequence_length: int,
    seed: int,
    all_experts: bool,
    trust_remote_code: bool,
    device: str,
    max_memory: str | None,
    threads: int | None,
    check: str | None,
    max_kl: float | None,
    no_verify: bool,
    as_json: bool,
) -> None:
    """Write a smaller model, and prove it."""
    with cli_text.uncollected():
        from bitpress.compression import run
        from bitpress.planning import tensor_parallel
        from bitpress.planning.calibration_config import CalibrationConfig
        from bitpress.runtime import watchdog

    with watchdog.started(device) as ranks:
        limit = cli_text.size(max_memory)
        job = run.prepare(
            model,
            scheme=scheme,
            recipe_file=recipe,
            settings=settings,
            ignore=ignore,
            calibration=CalibrationConfig(calibration, samples, sequence_length, seed, all_experts),
            check=check,
            trust_remote_code=trust_remote_code,
        )
        work = job.plan
        if ranks.first:
            plan_output.remarks(work, job.warnings, tensor_parallel.remarks(work))
            if calibration is not None and job.data is None:
                print(
                    "warning: no step of this recipe needs data: --calibration is not used",
                    file=sys.stderr,
                )
        with cli_text.progress(as_json or not ranks.first) as progress:
            note = run.carry_out(
                job,
                out,
                device,
                threads,
                limit,
                not no_verify,
                max_kl,
                trust_remote_code,
                progress,
                ranks,
            )
    if ranks.first:
        result = {
            "before": work.source_bytes,
            "after": work.output_bytes,
            "verified": not no_verify,
            **note.as_json(),
        }
        cli_text.document(result) if as_json else output.summary(
            note, work, out, verified=not no_verify
        )


@app.command()
@options.model
@click.option(
    "--schemes",
    metavar="NAME,NAME",
    required=True,
    help="What each layer may get: NAME or NAME:OPTION=VALUE; or none.",
)
@click.option(
    "--budget",
    metavar="BITS",
    type=float,
    required=True,
    help="Stored bits per weight, on average.",
)
@click.option(
    "--out", metavar="FILE", type=options.FILE, default="recipe.toml", help="The recipe to write."
)
@options.settings
@options.texts(64)
@options.machine
@options.as_json
def search(
    model: str,
    schemes: str,
    budget: float,
    out: Path,
    settings: Sequence[str],
    ignore: Sequence[str],
    calibration: str | None,
    samples: int,
    sequence_length: int,
    seed: int,
    all_experts: bool,
    trust_remote_code: bool,
    device: str,
    max_memory: str | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Measure what schemes cost each layer, and write the recipe that costs least in so many
    bits.
    """
    with cli_text.uncollected():
        from bitpress.compression.search import search as searching
        from bitpress.planning.calibration_config import CalibrationConfig

    limit = cli_text.size(max_memory)
    job = searching.prepare(
        model,
        out,
        schemes=[name.strip() for name in schemes.split(",")],
        budget=budget,
        settings=settings,
        ignore=ignore,
        calibration=CalibrationConfig(calibration, samples, sequence_length, seed, all_experts),
        trust_remote_code=trust_remote_code,
    )
    output.warn(job.data.warnings)
    with cli_text.progress(as_json) as progress:
        found = searching.carry_out(job, out, device, threads, limit, trust_remote_code, progress)
    cli_text.document(output.search_json(found, out)) if as_json else output.search_table(
        found, out
    )


@app.command()
@options.out
@click.option("--against", metavar="MODEL", help="The source to compare with.")
@options.threads
@options.as_json
def verify(out: Path, against: str | None, threads: int | None, as_json: bool) -> None:
    """Open an output again and prove its files; exit 1 if something is wrong."""
    with cli_text.uncollected():
        from bitpress import api

    with cli_text.progress(as_json) as progress:
        report = api.verify(out, against, threads, progress)
    output.warn(report.remarks)
    if as_json:
        cli_text.document(
            {
                "ok": not report.faults,
                "faults": [str(fault) for fault in report.faults],
                "errors": report.errors,
                "remarks": report.remarks,
            }
        )
    elif not report.faults:
        compared = (
            f"{len(report.errors)} layers compared with {against}"
            if against
            else "no source given: weights not compared"
        )
        print(f"{out}: nothing wrong ({compared})")
    if report.faults:
        raise VerificationError(f"{out}: {len(report.faults)} faults", report.faults)


@app.command("eval")
@options.model
@click.option(
    "--text", metavar="FILE", required=True, help="What it is judged on: .txt, .jsonl, .parquet."
)
@click.option("--against", metavar="REFERENCE", help="The model to compare with.")
@options.sequence_length
@options.number("--max-tokens", "Tokens taken of the text, from its start.", 65536)
@options.machine
@options.as_json
def evaluate(
    model: str,
    text: str,
    against: str | None,
    sequence_length: int,
    max_tokens: int,
    trust_remote_code: bool,
    device: str,
    max_memory: str | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Perplexity of a model on a text; against another, KL divergence and top-1 agreement."""
    with cli_text.uncollected():
        from bitpress import api

    with cli_text.progress(as_json) as progress:
        found = api.evaluate(
            model,
            text,
            against,
            sequence_length=sequence_length,
            max_tokens=max_tokens,
            device=device,
            threads=threads,
            max_memory=cli_text.size(max_memory),
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    cli_text.document(
        {"model": model, "against": against, **attrs.asdict(found)}
    ) if as_json else output.check(found)


@app.command()
@options.out
@options.as_json
def inspect(out: Path, as_json: bool) -> None:
    """Show what is inside an output: schemes, bits per weight, error per layer."""
    with cli_text.uncollected():
        from bitpress import api

    note = api.inspect(out)
    cli_text.document(note.as_json() | {"bits": note.bits}) if as_json else output.manifest(note)


@app.command()
@options.out
@click.option(
    "--html",
    "file",
    metavar="FILE",
    type=options.FILE,
    help="The page (default: OUT.html beside OUT).",
)
def report(out: Path, file: Path | None) -> None:
    """Write one HTML page about an output: sizes, errors, where it serves, what it was made
    from.
    """
    with cli_text.uncollected():
        from bitpress import api

    print(f"{api.report(out, file)}: written")


@app.command()
@options.out
@options.argument("dense", "DENSE", "The folder to write the plain model into.", type=options.FILE)
def decompress(out: Path, dense: Path) -> None:
    """Write a plain checkpoint with the weights that an output's loader computes with."""
    with cli_text.uncollected():
        from bitpress import api

    with cli_text.progress(False) as progress:
        api.decompress(out, dense, progress)
    print(f"{dense}: written")


@app.command("new-scheme")
@options.argument("name", "NAME", "What `--scheme` will call it.")
def new_scheme(name: str) -> None:
    """Write a package with a scheme of your own, bitpress-scheme-NAME, to start from."""
    from bitpress.schemes import template

    folder = template.write(name, Path())
    print(
        f"{folder}: written; edit {template.module(name)}.py there, and try it: pip install -e "
        "'.[test]' && pytest"
    )
