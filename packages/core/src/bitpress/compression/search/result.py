"""What a search has chosen, and the recipe that it writes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import attrs
from attrs import frozen

from bitpress.compression.search.search_job import Divergences, SearchJob
from bitpress.runtime.version import __version__
from bitpress.schemes.registry import Step

# A candidate for each unit, both by name.
Choice = Mapping[str, str]


@frozen(eq=False)
class SearchResult:
    """The choice that costs least in a budget.

    Attributes:
        search: what was searched.
        choice: by unit the candidate.
        divergences: by unit and candidate, what that alone costs, in nats per token.
        tokens: how many these were measured on.
    """

    search: SearchJob
    choice: Choice
    divergences: Divergences
    tokens: int

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the user should know of the texts."""
        return self.search.calibration.warnings

    def bits(self, choice: Choice | None = None) -> float:
        """Stored bits per weight of this or another choice, scales included."""
        choice, units = choice or self.choice, self.search.units
        num_bytes = sum(unit.num_bytes(choice[unit.name]) for unit in units)
        return 8 * num_bytes / sum(unit.num_weights for unit in units)

    def divergence(self, choice: Choice | None = None) -> float:
        """The sum of what this or another choice costs unit by unit, in nats per token."""
        return sum(self.divergences[item] for item in (choice or self.choice).items())

    def everywhere(self, candidate: str) -> Choice:
        """The choice of one candidate for all."""
        return dict.fromkeys(self.choice, candidate)


def render_recipe(result: SearchResult) -> str:
    """The TOML file: for each candidate the layers that get it, those that must stay together on
    one line.
    """
    lines = list(_render_head(result))
    for candidate in result.search.candidates:
        if candidate in result.choice.values():
            lines += ["", *_render_rule(result, candidate)]
    return "\n".join(lines) + "\n"


def _render_head(result: SearchResult) -> Iterator[str]:
    search = result.search
    options = f"--budget {search.budget:g} --schemes {','.join(search.candidates)}"
    yield f"# by bitpress {__version__}: search {_quote(search.model)} {options}"
    yield (
        f"# {result.bits():.2f} bits per weight, expected KL divergence {result.divergence():.6f} "
        "nats per token"
    )
    for name in search.candidates:
        choice = result.everywhere(name)
        yield (
            f"# {name} everywhere: {result.bits(choice):.2f} bits per weight, "
            f"{result.divergence(choice):.6f}"
        )
    yield "#"
    yield (
        "# What a line costs by itself, in nats per token, stands behind it: measured on "
        f"{result.tokens:,} tokens of"
    )
    yield (
        f"# {_quote(search.calibration.source)}. A line may be moved to another list; what is on "
        "one line must get the same steps."
    )


def _render_rule(result: SearchResult, candidate: str) -> Iterator[str]:
    search = result.search
    yield "[[layers]]"
    yield "match = ["
    for unit in search.units:
        if result.choice[unit.name] == candidate:
            patterns = " ".join(f"{_quote(pattern)}," for pattern in unit.patterns)
            costs = ", ".join(
                f"{name} {result.divergences[unit.name, name]:.6f}" for name in search.candidates
            )
            yield f"    {patterns}  # {costs}"
    yield "]"
    yield f"steps = [{', '.join(map(_render_step, search.candidates[candidate]))}]"


def _render_step(step: Step) -> str:
    """The scheme's name, or a table with the options that are not the default ones."""
    defaults = step.scheme.step().options
    options = {
        name: value
        for name, value in attrs.asdict(step.options).items()
        if value != getattr(defaults, name)
    }
    scheme = _quote(step.scheme.name)
    if not options:
        return scheme
    values = ", ".join(f"{name} = {_quote(value)}" for name, value in options.items())
    return f"{{ use = {scheme}, {values} }}"


def _quote(value: Any) -> str:
    """As TOML, which takes JSON's numbers, lists and (but for characters that no name has)
    strings.
    """
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
