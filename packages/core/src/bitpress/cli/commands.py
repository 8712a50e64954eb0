"""The commands. They parse, call `run` or `outputs`, and show; torch is imported only where work is
done.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import attrs
import click

from bitpress import hardware
from bitpress.cli import arguments, planned, searched, show, terminal
from bitpress.errors import VerificationError
from bitpress.schemes import discover


@click.group(
    cls=arguments.Commands,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
)
@click.option("--version", "show_version", is_flag=True, help="Print the version.")
@click.pass_context
def app(context: click.Context, show_version: bool) -> None:
    """Makes language models on disk smaller, for vLLM and transformers."""
    if show_version:
        from bitpress import __version__
        from bitpress.hookspecs import VERSION

        print(f"bitpress {__version__} (hooks {VERSION})")
        context.exit()
    elif context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
@arguments.argument("name", "[NAME]", "Show one scheme's options and hardware.", required=False)
@click.option("--device", metavar="NAME", help="Only what concerns one device: A100.")
@arguments.as_json
def schemes(name: str | None, device: str | None, as_json: bool) -> None:
    """List installed schemes, or show one with its options and the hardware it serves on."""
    registry = discover()
    devices = hardware.KNOWN if device is None else (hardware.find(device),)
    if name is not None:
        step = registry.get(name).step()
        terminal.document(show.scheme_json(step, devices)) if as_json else show.scheme(
            step, devices
        )
    else:
        terminal.document(show.registry_json(registry, devices)) if as_json else show.registry(
            registry, devices
        )


@app.command()
@arguments.model
@arguments.recipe
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
@arguments.threads
@arguments.as_json
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
    with terminal.uncollected():
        from bitpress import compute, forecast, needs, run, serving

    served = None if device is None else hardware.find(device)
    work = run.plan(
        model, scheme=scheme, recipe_file=recipe, settings=settings, ignore=ignore, device=served
    )
    shares, threads = forecast.shares(work, count), threads or max(compute.cores() // count, 1)
    found = planned.Needs(
        needs.memory(work, threads),
        needs.scratch(work, max(share.tokens for share in shares)),
        ranks,
        tuple(serving.remarks(work, ranks)),
        tuple(shares),
        threads,
        forecast.seconds(shares, threads),
    )
    terminal.document(planned.as_json(work, found)) if as_json else planned.table(work, found)


@app.command()
@arguments.model
@arguments.argument(
    "out", "OUT", "The folder to write; it must not hold anything else.", type=arguments.FILE
)
@arguments.recipe
@arguments.texts(256)
@arguments.machine
@click.option(
    "--check", metavar="TEXT", help="Compare the result's predictions of a text with its source's."
)
@click.option("--max-kl", metavar="X", type=float, help="Exit 1 if they differ by more nats.")
@click.option(
    "--no-verify", is_flag=True, help="Do not open and prove what was written; no digests."
)
@arguments.as_json
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
    with terminal.uncollected():
        from bitpress import launch, run, serving
        from bitpress.calibrate.texts import Choice

    with launch.started(device) as ranks:
        limit = terminal.size(max_memory)
        job = run.prepare(
            model,
            scheme=scheme,
            recipe_file=recipe,
            settings=settings,
            ignore=ignore,
            calibration=Choice(calibration, samples, sequence_length, seed, all_experts),
            check=check,
            trust_remote_code=trust_remote_code,
        )
        work = job.plan
        if ranks.first:
            planned.remarks(work, job.warnings, serving.remarks(work))
            if calibration is not None and job.data is None:
                print(
                    "warning: no step of this recipe needs data: --calibration is not used",
                    file=sys.stderr,
                )
        with terminal.progress(as_json or not ranks.first) as progress:
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
            "before": work.bytes_before,
            "after": work.bytes_after,
            "verified": not no_verify,
            **note.as_json(),
        }
        terminal.document(result) if as_json else show.summary(
            note, work, out, verified=not no_verify
        )


@app.command()
@arguments.model
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
    "--out", metavar="FILE", type=arguments.FILE, default="recipe.toml", help="The recipe to write."
)
@arguments.settings
@arguments.texts(64)
@arguments.machine
@arguments.as_json
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
    with terminal.uncollected():
        from bitpress.budget import search as searching
        from bitpress.calibrate.texts import Choice

    limit = terminal.size(max_memory)
    job = searching.prepare(
        model,
        out,
        schemes=[name.strip() for name in schemes.split(",")],
        budget=budget,
        settings=settings,
        ignore=ignore,
        calibration=Choice(calibration, samples, sequence_length, seed, all_experts),
        trust_remote_code=trust_remote_code,
    )
    show.warn(job.data.warnings)
    with terminal.progress(as_json) as progress:
        found = searching.carry_out(job, out, device, threads, limit, trust_remote_code, progress)
    terminal.document(searched.as_json(found, out)) if as_json else searched.table(found, out)


@app.command()
@arguments.out
@click.option("--against", metavar="MODEL", help="The source to compare with.")
@arguments.threads
@arguments.as_json
def verify(out: Path, against: str | None, threads: int | None, as_json: bool) -> None:
    """Open an output again and prove its files; exit 1 if something is wrong."""
    with terminal.uncollected():
        from bitpress import outputs

    with terminal.progress(as_json) as progress:
        report = outputs.verify(out, against, threads, progress)
    show.warn(report.remarks)
    if as_json:
        terminal.document(
            {
                "ok": not report.faults,
                "faults": report.faults,
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
@arguments.model
@click.option(
    "--text", metavar="FILE", required=True, help="What it is judged on: .txt, .jsonl, .parquet."
)
@click.option("--against", metavar="REFERENCE", help="The model to compare with.")
@arguments.sequence_length
@arguments.number("--max-tokens", "Tokens taken of the text, from its start.", 65536)
@arguments.machine
@arguments.as_json
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
    with terminal.uncollected():
        from bitpress import outputs

    with terminal.progress(as_json) as progress:
        found = outputs.evaluate(
            model,
            text,
            against,
            sequence_length=sequence_length,
            max_tokens=max_tokens,
            device=device,
            threads=threads,
            max_memory=terminal.size(max_memory),
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    terminal.document(
        {"model": model, "against": against, **attrs.asdict(found)}
    ) if as_json else show.check(found)


@app.command()
@arguments.out
@arguments.as_json
def inspect(out: Path, as_json: bool) -> None:
    """Show what is inside an output: schemes, bits per weight, error per layer."""
    with terminal.uncollected():
        from bitpress import outputs

    note = outputs.inspect(out)
    terminal.document(note.as_json() | {"bits": note.bits}) if as_json else show.manifest(note)


@app.command()
@arguments.out
@click.option(
    "--html",
    "file",
    metavar="FILE",
    type=arguments.FILE,
    help="The page (default: OUT.html beside OUT).",
)
def report(out: Path, file: Path | None) -> None:
    """Write one HTML page about an output: sizes, errors, where it serves, what it was made
    from.
    """
    with terminal.uncollected():
        from bitpress import outputs

    print(f"{outputs.report(out, file)}: written")


@app.command()
@arguments.out
@arguments.argument(
    "dense", "DENSE", "The folder to write the plain model into.", type=arguments.FILE
)
def decompress(out: Path, dense: Path) -> None:
    """Write a plain checkpoint with the weights that an output's loader computes with."""
    with terminal.uncollected():
        from bitpress import outputs

    with terminal.progress(False) as progress:
        outputs.decompress(out, dense, progress)
    print(f"{dense}: written")


@app.command("new-scheme")
@arguments.argument("name", "NAME", "What `--scheme` will call it.")
def new_scheme(name: str) -> None:
    """Write a package with a scheme of your own, bitpress-scheme-NAME, to start from."""
    from bitpress import newscheme

    folder = newscheme.write(name, Path())
    print(
        f"{folder}: written; edit {newscheme.module(name)}.py there, and try it: pip install -e "
        "'.[test]' && pytest"
    )
