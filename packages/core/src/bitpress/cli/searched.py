"""How a search's choice is shown."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitpress.cli.show import table as columns

if TYPE_CHECKING:
    from bitpress.budget.found import Found


def table(found: Found, out: Path) -> None:
    """What every layer gets, and would lose by each scheme; what the whole loses, and would with
    one scheme everywhere.
    """
    search, names = found.search, list(found.search.candidates)
    rows = [
        (u.name, *(f"{found.damages[u.name, n]:.6f}" for n in names), found.chosen[u.name])
        for u in search.units
    ]
    print(
        f"nats per token that each layer costs by itself, on {found.tokens:,} tokens of "
        f"{search.data.source}:"
    )
    columns(("layers", *names, "chosen"), rows)
    choices = [("chosen", found.chosen)] + [
        (f"{name} everywhere", found.everywhere(name)) for name in names
    ]
    rows = [
        (name, f"{found.bits(choice):.2f}", f"{found.damage(choice):.6f}")
        for name, choice in choices
    ]
    columns(("", "bits per weight", "expected KL divergence"), rows)
    print(f"{out}: written; carry it out: bitpress compress {search.model} OUT --recipe {out}")


def as_json(found: Found, out: Path) -> dict[str, Any]:
    """The same as JSON."""
    search, names = found.search, list(found.search.candidates)
    return {
        "recipe": str(out),
        "budget": search.budget,
        "bits": found.bits(),
        "kl": found.damage(),
        "everywhere": {
            n: {"bits": found.bits(found.everywhere(n)), "kl": found.damage(found.everywhere(n))}
            for n in names
        },
        "layers": [
            {
                "name": u.name,
                "modules": u.modules,
                "chosen": found.chosen[u.name],
                "candidates": {
                    n: {"bytes": u.size(n), "kl": found.damages[u.name, n]} for n in names
                },
            }
            for u in search.units
        ],
        "text": search.data.source,
        "tokens": found.tokens,
    }
