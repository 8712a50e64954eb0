"""What a search has to say."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import frozen

from bitpress.cli.text import print_table, say
from bitpress.runtime.memory import format_bytes

if TYPE_CHECKING:
    from bitpress.compression.search.result import Choice, SearchResult
    from bitpress.compression.search.units import CacheUnit


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
                "bytes": result.weight_bytes(result.everywhere(name)),
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
                    for name in unit.candidates
                },
            }
            for unit in search.units
        ]
        return {
            "recipe": str(self.out),
            "budget": search.budget.bits,
            "budget_bytes": search.budget.num_bytes,
            "bits": result.bits(),
            "bytes": result.weight_bytes(),
            "kl": result.divergence(),
            "everywhere": everywhere,
            "layers": layers,
            "cache": None if search.cache is None else self._cache_json(search.cache),
            "text": search.calibration.source,
            "tokens": result.tokens,
        }

    def _cache_json(self, cache: CacheUnit) -> dict[str, Any]:
        result = self.result
        candidates = {
            name: {
                "bytes_per_token": cache.token_bytes(name),
                "kl": result.divergences[cache.name, name],
            }
            for name in cache.candidates
        }
        chosen = result.choice[cache.name]
        return {
            "tokens": cache.tokens,
            "bytes": result.cache_bytes(),
            "chosen": chosen,
            "candidates": candidates,
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
            divergences = [
                f"{result.divergences[unit.name, name]:.6f}" if name in unit.candidates else "-"
                for name in candidates
            ]
            rows.append((unit.name, *divergences, result.choice[unit.name]))
        print_table(("layers", *candidates, "chosen"), rows)
        if search.cache is not None:
            self._print_cache(search.cache)

        choices = {"chosen": result.choice}
        choices |= {f"{name} everywhere": result.everywhere(name) for name in candidates}
        totals = [
            (name, *self._sizes(choice), f"{result.divergence(choice):.6f}")
            for name, choice in choices.items()
        ]
        sizes = [] if search.budget.num_bytes is None else ["weights"]
        sizes += [] if search.cache is None else ["cache"]
        print_table(("", "bits per weight", *sizes, "expected KL divergence"), totals)
        say(
            f"{self.out}: written; carry it out: bitpress compress {search.model} OUT --recipe "
            f"{self.out}"
        )

    def _print_cache(self, cache: CacheUnit) -> None:
        """What each candidate keeps of a token, and costs."""
        rows = [
            (
                f"{cache.token_bytes(name):,}",
                f"{self.result.divergences[cache.name, name]:.6f}",
                name,
            )
            for name in cache.candidates
        ]
        print_table(("bytes of each token's cache", "KL divergence", "candidate"), rows)
        say(f"chosen for the cache: {self.result.choice[cache.name]}")

    def _sizes(self, choice: Choice) -> list[str]:
        """Of a choice, what a budget of its kind counts."""
        result, search = self.result, self.result.search
        sizes = [f"{result.bits(choice):.2f}"]
        if search.budget.num_bytes is not None:
            sizes.append(format_bytes(result.weight_bytes(choice)))
        if search.cache is not None:
            sizes.append(format_bytes(result.cache_bytes(choice)))
        return sizes
