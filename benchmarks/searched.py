"""Searched recipes beside one scheme everywhere and beside plain mixes of the same size, on
tiny-llama.

    python benchmarks/searched.py [--work DIR] [--json FILE]

Recipes are searched on 64 sequences of ../shared/calib/calib.jsonl and all results calibrated on
the same; KL divergence from the source is measured on the first 16,384 tokens of
../shared/eval/heldout.txt. A plain mix fills the budget with the better scheme in an order that
people take: first blocks first, last blocks first, attention first, or as the dice fall.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from attrs import asdict, frozen

import bitpress

SHARED = Path(__file__).parents[2] / "shared"
MODEL, TEXTS, HELDOUT = (
    SHARED / "models/tiny-llama",
    SHARED / "calib/calib.jsonl",
    SHARED / "eval/heldout.txt",
)
DATA: dict[str, Any] = {"calibration": TEXTS, "samples": 64, "threads": 1}


@frozen
class Case:
    """What is searched, and what is as large: schemes everywhere, and with `mixes` two schemes
    mixed without looking.
    """

    schemes: tuple[str, ...]
    budget: float
    uniform: tuple[tuple[str, tuple[str, ...]], ...] = ()
    mixes: bool = False


CASES = (
    Case(("nvfp4", "fp8"), 5.5, (("nvfp4", ()), ("fp8", ())), mixes=True),
    Case(("nvfp4", "fp8"), 6.5, mixes=True),
    Case(("nvfp4", "fp8", "none"), 8.07, (("fp8", ()),)),
    Case(("w4a16", "w8a16"), 4.5, (("w4a16", ()), ("w4a16", ("group_size=32",))), mixes=True),
    Case(("w4a16", "w8a16", "none"), 8.13, (("w8a16", ()),)),
)


@frozen
class Row:
    """What one choice gives."""

    case: str
    choice: str
    bits: float
    expected: float | None
    kl: float
    top1: float


def main() -> None:
    """Search, carry out, measure, and print a row for each budget."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("bench-output"), help="where outputs go")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    arguments.work.mkdir(exist_ok=True)
    rows = []
    print(
        "| schemes, budget | choice | bits per weight | expected KL | KL | top-1 |"
        "\n|---|---|---|---|---|---|"
    )
    for case in CASES:
        for row in figures(case, arguments.work):
            rows.append(row)
            expected = "" if row.expected is None else f"{row.expected:.5f}"
            print(
                f"| {row.case} | {row.choice} | {row.bits:.2f} | {expected} | {row.kl:.5f} | "
                f"{row.top1:.2%} |",
                flush=True,
            )
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=2))


def figures(case: Case, folder: Path) -> Iterator[Row]:
    """The searched recipe's row, and of what is as large."""
    name, recipe = f"{', '.join(case.schemes)} at {case.budget:g}", folder / "recipe.toml"
    recipe.unlink(missing_ok=True)
    result = bitpress.search(MODEL, recipe, schemes=case.schemes, budget=case.budget, **DATA)
    yield measure(name, "searched", folder, result.divergence(), recipe=recipe)
    for scheme, settings in case.uniform:
        expected = (
            result.divergence(result.everywhere(scheme))
            if scheme in case.schemes and not settings
            else None
        )
        yield measure(
            name,
            " ".join([scheme, *settings, "everywhere"]),
            folder,
            expected,
            scheme=scheme,
            settings=settings,
        )
    for mix, choice in mixes(result) if case.mixes else ():
        recipe.write_text(render_recipe(result, choice))
        yield measure(name, mix, folder, result.divergence(choice), recipe=recipe)


def mixes(result: Any) -> Iterator[tuple[str, dict[str, str]]]:
    """The small scheme, and the large one wherever there is still room for it, in several
    orders.
    """
    small, large = sorted(
        result.search.candidates, key=lambda name: result.bits(result.everywhere(name))
    )
    blocks = list(result.search.units)
    orders: dict[str, Sequence[Any]] = {
        f"{large} in the first blocks": blocks,
        f"{large} in the last blocks": blocks[::-1],
        f"{large} in the attention": sorted(blocks, key=lambda unit: "attn" not in unit.name),
        **{
            f"{large} anywhere, draw {i}": random.Random(i).sample(blocks, len(blocks))
            for i in (1, 2)
        },
    }
    for name, order in orders.items():
        choice = dict(result.everywhere(small))
        for unit in order:
            if result.bits({**choice, unit.name: large}) <= result.search.budget + 0.005:
                choice[unit.name] = large
        yield name, choice


def render_recipe(result: Any, choice: dict[str, str]) -> str:
    """A choice as a recipe."""
    rule = "[[layers]]\nmatch = {}\nsteps = {}\n"
    return "\n".join(
        rule.format(json.dumps(u.patterns), json.dumps([choice[u.name]]))
        for u in result.search.units
    )


def measure(case: str, choice: str, folder: Path, expected: float | None, **options: Any) -> Row:
    """Compress, and compare with the source."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    manifest = bitpress.compress(MODEL, out, **options, **DATA, verify=False)
    check = bitpress.eval(out, HELDOUT, MODEL, max_tokens=16384, threads=1)
    assert check.kl is not None
    assert check.top1 is not None
    return Row(case, choice, manifest.bits, expected, check.kl, check.top1)


if __name__ == "__main__":
    main()
