"""The command `bitpress`. Commands parse, call `bitpress.run`, and show; torch is imported only where work is done."""

from __future__ import annotations

import contextlib
import gc
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from bitpress import hardware
from bitpress.cli import show
from bitpress.errors import BitpressError, RecipeError, VerificationError
from bitpress.progress import Progress, Told, quiet
from bitpress.schemes import discover

app = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Makes language models on disk smaller, for vLLM and transformers.",
)  # fmt: skip

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Scheme = Annotated[str | None, typer.Option("--scheme", metavar="NAME[+NAME]", help="A scheme, or several joined by +.")]
RecipeFile = Annotated[Path | None, typer.Option("--recipe", metavar="FILE", help="A TOML file: which layers get which steps.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="[SCHEME.]OPTION=VALUE", help="Set an option; may be repeated.")]
Ignore = Annotated[
    list[str] | None, typer.Option("--ignore", metavar="PATTERN", help="Leave matching layers alone; may be repeated.")
]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="Layers worked on side by side (default: one per core).")]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="A model folder, or a Hub name.")]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="A folder that bitpress wrote.")]


@app.command()
def schemes(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Show one scheme's options and hardware.")] = None,
    device: Annotated[str | None, typer.Option("--device", help='Only what concerns one device, such as "NVIDIA A100".')] = None,
    as_json: Json = False,
) -> None:
    """List installed schemes, or show one with its options and the hardware it serves on."""
    registry = discover()
    devices = hardware.KNOWN if device is None else (hardware.find(device),)
    if name is not None:
        step = registry.get(name).step()
        _print(show.scheme_json(step, devices)) if as_json else show.scheme(step, devices)
    else:
        _print(show.registry_json(registry, devices)) if as_json else show.registry(registry, devices)


@app.command()
def plan(
    model: Model, scheme: Scheme = None, recipe: RecipeFile = None, settings: Set = None, ignore: Ignore = None,
    threads: Threads = None, as_json: Json = False,
) -> None:  # fmt: skip
    """Show what would be done, from headers alone."""
    with _uncollected():
        from bitpress import run

    work = run.plan(model, scheme=scheme, recipe_file=recipe, settings=settings or (), ignore=ignore or ())
    memory = run.memory(work, threads)
    _print(show.plan_json(work, memory)) if as_json else show.plan(work, memory)


@app.command()
def compress(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write; it must not hold anything else.")],
    scheme: Scheme = None, recipe: RecipeFile = None, settings: Set = None, ignore: Ignore = None,
    calibration: Annotated[
        str | None,
        typer.Option("--calibration", metavar="FILE|DATASET", help="Texts like those it will serve: .jsonl, .txt, .parquet."),
    ] = None,
    samples: Annotated[int, typer.Option("--samples", help="Sequences taken of them.")] = 256,
    sequence_length: Annotated[int, typer.Option("--sequence-length", help="Tokens of a sequence.")] = 512,
    seed: Annotated[int, typer.Option("--seed", help="0 takes sequences from the start, others draw them.")] = 0,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Let code in the model's folder run.")] = False,
    device: Annotated[str, typer.Option("--device", metavar="cpu|cuda|cuda:N", help="What computes.")] = "cpu",
    max_memory: Annotated[str | None, typer.Option("--max-memory", metavar="SIZE", help="Refuse if more is needed: 4GB.")] = None,
    threads: Threads = None,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Do not open and prove what was written; no digests.")] = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Write a smaller model, and prove it."""
    with _uncollected():
        from bitpress import run
        from bitpress.calibrate.texts import Choice

    limit = None if max_memory is None else _size(max_memory)
    job = run.prepare(
        model, scheme=scheme, recipe_file=recipe, settings=settings or (), ignore=ignore or (),
        calibration=Choice(calibration, samples, sequence_length, seed), trust_remote_code=trust_remote_code,
    )  # fmt: skip
    work = job.plan
    show.remarks(work, job.warnings)
    if calibration is not None and job.data is None:
        print("warning: no step of this recipe needs data: --calibration is not used", file=sys.stderr)
    with _progress(as_json) as progress:
        note = run.carry_out(job, out, device, threads, limit, not no_verify, trust_remote_code, progress)
    result = {"before": work.bytes_before, "after": work.bytes_after, "verified": not no_verify, **note.as_json()}
    _print(result) if as_json else show.summary(note, work, out, verified=not no_verify)


@app.command()
def verify(
    out: Out,
    against: Annotated[str | None, typer.Option("--against", metavar="MODEL", help="The source to compare with.")] = None,
    threads: Threads = None, as_json: Json = False,
) -> None:  # fmt: skip
    """Open an output again and prove its files; exit 1 if something is wrong."""
    with _uncollected():
        from bitpress import run

    with _progress(as_json) as progress:
        report = run.verify(out, against, threads, progress)
    if as_json:
        _print({"ok": not report.faults, "faults": report.faults, "errors": report.errors})
    elif not report.faults:
        compared = f"{len(report.errors)} layers compared with {against}" if against else "no source given: weights not compared"
        print(f"{out}: nothing wrong ({compared})")
    if report.faults:
        raise VerificationError(f"{out}: {len(report.faults)} faults", report.faults)


@app.command()
def inspect(out: Out, as_json: Json = False) -> None:
    """Show what is inside an output: schemes, bits per weight, error per layer."""
    with _uncollected():
        from bitpress import run

    note = run.inspect(out)
    _print(note.as_json() | {"bits": note.bits}) if as_json else show.manifest(note)


@app.command()
def decompress(
    out: Out, dense: Annotated[Path, typer.Argument(metavar="DENSE", help="The folder to write the plain model into.")],
) -> None:  # fmt: skip
    """Write a plain checkpoint with the weights that an output's loader computes with."""
    with _uncollected():
        from bitpress import run

    with _progress(False) as progress:
        run.decompress(out, dense, progress)
    print(f"{dense}: written")


@app.callback(invoke_without_command=True)
def version(
    context: typer.Context, show_version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    """Print the version, or what there is to run."""
    if show_version:
        from bitpress import __version__

        print(f"bitpress {__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


def main() -> None:
    """Run a command; a user's mistake is one line on standard error and exit code 2, a failed check exit code 1."""
    try:
        code = typer.main.get_command(app).main(prog_name="bitpress", standalone_mode=False)
        if code == 130:  # what typer makes of an interrupt, without a word
            raise KeyboardInterrupt
    except VerificationError as e:
        for fault in e.faults[:10]:
            print(f"  {fault}", file=sys.stderr)
        if len(e.faults) > 10:
            print(f"  and {len(e.faults) - 10} more", file=sys.stderr)
        code = _fail(str(e), 1)
    except BitpressError as e:
        code = _fail(str(e))
    except KeyboardInterrupt:
        code = _fail("interrupted; the same command goes on from the finished shards", 130)
    except OSError as e:
        code = _fail(f"{e.filename or 'operating system'}: {e.strerror or e}")
    except Exception as e:  # typer's own errors, whose classes differ between its versions
        if not hasattr(e, "format_message"):
            raise
        code = _fail(f"{e.format_message()} (bitpress --help)")
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int = 2) -> int:
    print(f"bitpress: {' '.join(message.split())}", file=sys.stderr)
    return code


def _print(value: Any) -> None:
    print(json.dumps(value, indent=2, default=str))


def _size(text: str) -> int:
    found = re.fullmatch(r"\s*([\d.]+)\s*([kmgt]?)i?b?\s*", text.lower())
    try:
        number = float(found[1]) if found else -1.0
    except ValueError:
        number = -1.0
    if not found or number < 0:
        raise RecipeError(f"--max-memory {text}: a size such as 4GB or 500MB is expected")
    return int(number * 1000 ** " kmgt".index(found[2] or " "))


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Imports inside make objects that stay to the end: looking through them for garbage costs a third of importing torch."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextlib.contextmanager
def _progress(silent: bool) -> Iterator[Progress]:
    """A bar per stage with the time left, on a terminal; nothing elsewhere."""
    if silent or not sys.stderr.isatty():
        yield quiet
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress as Bars, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Bars(*columns, console=Console(stderr=True)) as bars:

        def stage(stage: str, total: int) -> Told:
            task = bars.add_task(stage, total=total)
            return lambda done, what="": bars.update(task, advance=done, description=f"{stage} {what}".strip())

        yield stage
