"""What a search has to say."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import frozen

from bitpress.cli.text import print_table, say

if TYPE_CHECKING:
    from bitpress.compression.search.result import SearchResult


@frozen(eq=False)
class SearchSummary:
    """A choice of candidates for layers, and the recipe file that holds it."""

    result: SearchResult
    out: Path

    def as_json(self) -> dict[str, Any]:
        """The choice with its size and divergence, and those of every other."""
        result, search = self.result, self.result.search
        everywhere = {
            name: {
                "bits": result.bits(result.everywhere(name)),
                "kl": result.divergence(result.everywhere(name)),
            }
            for name in search.candidates
        }
        layers = [
            {
                "name": unit.name,
                "modules": unit.modules,
                "chosen": result.choice[unit.name],
                "candidates": {
                    name: {"bytes": unit.num_bytes(name), "kl": result.divergences[unit.name, name]}
                    for name in search.candidates
                },
            }
            for unit in search.units
        ]
        return {
            "recipe": str(self.out),
            "budget": search.budget,
            "bits": result.bits(),
            "kl": result.divergence(),
            "everywhere": everywhere,
            "layers": layers,
            "text": search.calibration.source,
            "tokens": result.tokens,
        }

    def print_text(self) -> None:
        """What every layer gets, and would lose by each candidate; what the whole loses, and would
        with one candidate everywhere.
        """
        result, search = self.result, self.result.search
        candidates = list(search.candidates)
        say(
            f"nats per token that each layer costs by itself, on {result.tokens:,} tokens of "
            f"{search.calibration.source}:"
        )
        rows = []
        for unit in search.units:
            divergences = [f"{result.divergences[unit.name, name]:.6f}" for name in candidates]
            rows.append((unit.name, *divergences, result.choice[unit.name]))
        print_table(("layers", *candidates, "chosen"), rows)

        choices = {"chosen": result.choice}
        choices |= {f"{name} everywhere": result.everywhere(name) for name in candidates}
        totals = [
            (name, f"{result.bits(choice):.2f}", f"{result.divergence(choice):.6f}")
            for name, choice in choices.items()
        ]
        print_table(("", "bits per weight", "expected KL divergence"), totals)
        say(
            f"{self.out}: written; carry it out: bitpress compress {search.model} OUT --recipe "
            f"{self.out}"
        )
