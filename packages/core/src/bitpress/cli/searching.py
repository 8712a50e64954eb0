"""The command `search`, and how its outcome is shown."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitpress.cli import terminal
from bitpress.cli.arguments import (
    Calibration,
    Device,
    Ignore,
    Json,
    MaxMemory,
    Model,
    Samples,
    Seed,
    SequenceLength,
    Set,
    Threads,
    TrustRemoteCode,
)  # fmt: skip
from bitpress.cli.show import table as columns

if TYPE_CHECKING:
    from bitpress.search import Found


def search(
    model: Model,
    budget: Annotated[float, typer.Option("--budget", metavar="BITS", help="Per weight of what is compressed, scales included.")],
    schemes: Annotated[str, typer.Option("--schemes", metavar="NAME,NAME", help="What may be chosen for each layer.")],
    file: Annotated[Path, typer.Option("--out", metavar="FILE", help="Where the recipe goes.")] = Path("recipe.toml"),
    settings: Set = None, ignore: Ignore = None,
    calibration: Calibration = None, samples: Samples = 64, sequence_length: SequenceLength = 512, seed: Seed = 0,
    trust_remote_code: TrustRemoteCode = False, device: Device = "cpu", max_memory: MaxMemory = None, threads: Threads = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Find the recipe that changes a model's predictions least within a budget of bits, and write it."""
    with terminal.uncollected():
        from bitpress.search import search as run, written

    written.free(file)
    with terminal.progress(as_json) as progress:
        found = run(
            model, budget=budget, schemes=[name.strip() for name in schemes.split(",")], settings=settings or (),
            ignore=ignore or (), calibration=calibration, samples=samples, sequence_length=sequence_length, seed=seed,
            device=device, threads=threads, max_memory=terminal.size(max_memory), trust_remote_code=trust_remote_code,
            progress=progress,
        )  # fmt: skip
    written.write(found, file, model, budget)
    terminal.document(_json(found, file)) if as_json else _table(found, file)


def _table(found: Found, file: Path) -> None:
    """Every unit with what each candidate costs it, and the whole beside one candidate for all."""
    rows = [
        (unit.name, found.names[place], *(f"{cost:.6f}" for cost in costs))
        for unit, place, costs in zip(found.units, found.chosen, found.damages, strict=True)
    ]
    columns(("layers", "chosen", *(f"KL, {name}" for name in found.names)), rows)
    print()
    every = [(f"{name} for all", [i] * len(found.units)) for i, name in enumerate(found.names)]
    whole = [("chosen", found.chosen), *every]
    columns(("", "bits per weight", "KL expected"), [(n, f"{found.bits(c):.2f}", f"{found.damage(c):.5f}") for n, c in whole])
    print(f"\n{file}: written; bitpress compress MODEL OUT --recipe {file}")


def _json(found: Found, file: Path) -> dict[str, Any]:
    """The same as JSON."""
    units = [
        {"layers": unit.modules, "chosen": found.names[place], "kl": dict(zip(found.names, costs, strict=True))}
        for unit, place, costs in zip(found.units, found.chosen, found.damages, strict=True)
    ]
    alone = {name: [i] * len(found.units) for i, name in enumerate(found.names)}
    uniform = {name: {"bits": found.bits(c), "kl": found.damage(c)} for name, c in alone.items()}
    return {
        "recipe": str(file),
        "bits": found.bits(found.chosen),
        "kl": found.damage(found.chosen),
        "uniform": uniform,
        "units": units,
    }
