"""The commands. They parse, call `run` or `outputs`, and show; torch is imported only where work is done."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import attrs
import typer

from bitpress import hardware
from bitpress.cli import planned, searched, show, terminal
from bitpress.cli.arguments import (
    AllExperts,
    Calibration,
    Device,
    Ignore,
    Json,
    MaxMemory,
    Model,
    Out,
    RecipeFile,
    Samples,
    Scheme,
    Seed,
    SequenceLength,
    Set,
    Threads,
    TrustRemoteCode,
)
from bitpress.errors import VerificationError
from bitpress.schemes import discover

app = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Makes language models on disk smaller, for vLLM and transformers.",
)  # fmt: skip


@app.command()
def schemes(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Show one scheme's options and hardware.")] = None,
    device: Annotated[str | None, typer.Option("--device", metavar="NAME", help="Only what concerns one device: A100.")] = None,
    as_json: Json = False,
) -> None:
    """List installed schemes, or show one with its options and the hardware it serves on."""
    registry = discover()
    devices = hardware.KNOWN if device is None else (hardware.find(device),)
    if name is not None:
        step = registry.get(name).step()
        terminal.document(show.scheme_json(step, devices)) if as_json else show.scheme(step, devices)
    else:
        terminal.document(show.registry_json(registry, devices)) if as_json else show.registry(registry, devices)


@app.command()
def plan(
    model: Model, scheme: Scheme = None, recipe: RecipeFile = None, settings: Set = None, ignore: Ignore = None,
    ranks: Annotated[int, typer.Option("--tensor-parallel", metavar="N", help="Ranks of the engine that will serve it.")] = 1,
    device: Annotated[
        str | None, typer.Option("--hardware", metavar="NAME", help="What will serve it: H100 (default: this machine's).")
    ] = None,
    threads: Threads = None, as_json: Json = False,
) -> None:  # fmt: skip
    """Show what would be done, from headers alone."""
    with terminal.uncollected():
        from bitpress import needs, run, serving

    served = None if device is None else hardware.find(device)
    work = run.plan(model, scheme=scheme, recipe_file=recipe, settings=settings or (), ignore=ignore or (), device=served)
    found = planned.Needs(needs.memory(work, threads), needs.scratch(work), ranks, tuple(serving.remarks(work, ranks)))
    terminal.document(planned.as_json(work, found)) if as_json else planned.table(work, found)


@app.command()
def compress(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write; it must not hold anything else.")],
    scheme: Scheme = None, recipe: RecipeFile = None, settings: Set = None, ignore: Ignore = None,
    calibration: Calibration = None, samples: Samples = 256, sequence_length: SequenceLength = 512, seed: Seed = 0,
    all_experts: AllExperts = False,
    trust_remote_code: TrustRemoteCode = False, device: Device = "cpu", max_memory: MaxMemory = None, threads: Threads = None,
    check: Annotated[
        str | None, typer.Option("--check", metavar="TEXT", help="Compare the result's predictions of a text with its source's.")
    ] = None,
    max_kl: Annotated[float | None, typer.Option("--max-kl", metavar="X", help="Exit 1 if they differ by more nats.")] = None,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Do not open and prove what was written; no digests.")] = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Write a smaller model, and prove it."""
    with terminal.uncollected():
        from bitpress import launch, run, serving
        from bitpress.calibrate.texts import Choice

    with launch.started(device) as ranks:
        limit = terminal.size(max_memory)
        job = run.prepare(
            model, scheme=scheme, recipe_file=recipe, settings=settings or (), ignore=ignore or (),
            calibration=Choice(calibration, samples, sequence_length, seed, all_experts), check=check,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
        work = job.plan
        if ranks.first:
            planned.remarks(work, job.warnings, serving.remarks(work))
            if calibration is not None and job.data is None:
                print("warning: no step of this recipe needs data: --calibration is not used", file=sys.stderr)
        with terminal.progress(as_json or not ranks.first) as progress:
            note = run.carry_out(job, out, device, threads, limit, not no_verify, max_kl, trust_remote_code, progress, ranks)
    if ranks.first:
        result = {"before": work.bytes_before, "after": work.bytes_after, "verified": not no_verify, **note.as_json()}
        terminal.document(result) if as_json else show.summary(note, work, out, verified=not no_verify)


@app.command()
def search(
    model: Model,
    schemes: Annotated[
        str,
        typer.Option("--schemes", metavar="NAME,NAME", help="What each layer may get: NAME or NAME:OPTION=VALUE; or none."),
    ],
    budget: Annotated[float, typer.Option("--budget", metavar="BITS", help="Stored bits per weight, on average.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The recipe to write.")] = Path("recipe.toml"),
    settings: Set = None, ignore: Ignore = None, calibration: Calibration = None, samples: Samples = 64,
    sequence_length: SequenceLength = 512, seed: Seed = 0, all_experts: AllExperts = False,
    trust_remote_code: TrustRemoteCode = False, device: Device = "cpu", max_memory: MaxMemory = None, threads: Threads = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Measure what schemes cost each layer, and write the recipe that costs least in so many bits."""
    with terminal.uncollected():
        from bitpress.budget import search as searching
        from bitpress.calibrate.texts import Choice

    limit = terminal.size(max_memory)
    job = searching.prepare(
        model, out, schemes=[name.strip() for name in schemes.split(",")], budget=budget, settings=settings or (),
        ignore=ignore or (), calibration=Choice(calibration, samples, sequence_length, seed, all_experts),
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    show.warn(job.data.warnings)
    with terminal.progress(as_json) as progress:
        found = searching.carry_out(job, out, device, threads, limit, trust_remote_code, progress)
    terminal.document(searched.as_json(found, out)) if as_json else searched.table(found, out)


@app.command()
def verify(
    out: Out,
    against: Annotated[str | None, typer.Option("--against", metavar="MODEL", help="The source to compare with.")] = None,
    threads: Threads = None, as_json: Json = False,
) -> None:  # fmt: skip
    """Open an output again and prove its files; exit 1 if something is wrong."""
    with terminal.uncollected():
        from bitpress import outputs

    with terminal.progress(as_json) as progress:
        report = outputs.verify(out, against, threads, progress)
    show.warn(report.remarks)
    if as_json:
        terminal.document({"ok": not report.faults, "faults": report.faults, "errors": report.errors, "remarks": report.remarks})
    elif not report.faults:
        compared = f"{len(report.errors)} layers compared with {against}" if against else "no source given: weights not compared"
        print(f"{out}: nothing wrong ({compared})")
    if report.faults:
        raise VerificationError(f"{out}: {len(report.faults)} faults", report.faults)


@app.command("eval")
def evaluate(
    model: Model,
    text: Annotated[str, typer.Option("--text", metavar="FILE", help="What it is judged on: .txt, .jsonl, .parquet.")],
    against: Annotated[str | None, typer.Option("--against", metavar="REFERENCE", help="The model to compare with.")] = None,
    sequence_length: SequenceLength = 512,
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="Tokens taken of the text, from its start.")] = 65536,
    trust_remote_code: TrustRemoteCode = False, device: Device = "cpu", max_memory: MaxMemory = None,
    threads: Threads = None, as_json: Json = False,
) -> None:  # fmt: skip
    """Perplexity of a model on a text; against another, KL divergence and top-1 agreement."""
    with terminal.uncollected():
        from bitpress import outputs

    with terminal.progress(as_json) as progress:
        found = outputs.evaluate(
            model, text, against, sequence_length=sequence_length, max_tokens=max_tokens, device=device, threads=threads,
            max_memory=terminal.size(max_memory), trust_remote_code=trust_remote_code, progress=progress,
        )  # fmt: skip
    terminal.document({"model": model, "against": against, **attrs.asdict(found)}) if as_json else show.check(found)


@app.command()
def inspect(out: Out, as_json: Json = False) -> None:
    """Show what is inside an output: schemes, bits per weight, error per layer."""
    with terminal.uncollected():
        from bitpress import outputs

    note = outputs.inspect(out)
    terminal.document(note.as_json() | {"bits": note.bits}) if as_json else show.manifest(note)


@app.command()
def report(
    out: Out,
    file: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="The page (default: OUT.html beside OUT).")] = None,
) -> None:
    """Write one HTML page about an output: sizes, errors, where it serves, what it was made from."""
    with terminal.uncollected():
        from bitpress import outputs

    print(f"{outputs.report(out, file)}: written")


@app.command()
def decompress(
    out: Out, dense: Annotated[Path, typer.Argument(metavar="DENSE", help="The folder to write the plain model into.")],
) -> None:  # fmt: skip
    """Write a plain checkpoint with the weights that an output's loader computes with."""
    with terminal.uncollected():
        from bitpress import outputs

    with terminal.progress(False) as progress:
        outputs.decompress(out, dense, progress)
    print(f"{dense}: written")


@app.command("new-scheme")
def new_scheme(name: Annotated[str, typer.Argument(metavar="NAME", help="What `--scheme` will call it.")]) -> None:
    """Write a package with a scheme of your own, bitpress-scheme-NAME, to start from."""
    from bitpress import newscheme

    folder = newscheme.write(name, Path())
    print(f"{folder}: written; edit {newscheme.module(name)}.py there, and try it: pip install -e '.[test]' && pytest")


@app.callback(invoke_without_command=True)
def version(
    context: typer.Context, show_version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    """Print the version, or what there is to run."""
    if show_version:
        from bitpress import __version__
        from bitpress.hookspecs import VERSION

        print(f"bitpress {__version__} (hooks {VERSION})")
    elif context.invoked_subcommand is None:
        print(context.get_help())
