"""What a search has chosen, and the recipe that it writes."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import attrs
from attrs import frozen

from bitpress.compression.search.candidates import UNCOMPRESSED
from bitpress.compression.search.search_job import Divergences, SearchJob
from bitpress.compression.search.units import CACHE, CacheUnit, SearchUnit
from bitpress.runtime.memory import format_bytes
from bitpress.runtime.version import __version__
from bitpress.schemes.registry import Step
from bitpress.schemes.values import LEAST_EFFORT, NORMAL_EFFORT

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
        """Stored bits per weight of the layers by this or another choice, scales included: of those
        of the decoder blocks, and of the head and the embeddings where these are chosen for.
        """
        choice, units = choice or self.choice, self.search.units
        num_bytes = sum(unit.num_bytes(choice[unit.name]) for unit in units)
        return 8 * num_bytes / sum(unit.num_weights for unit in units)

    def weight_bytes(self, choice: Choice | None = None) -> int:
        """Bytes of all tensors that this or another choice stores."""
        choice, search = choice or self.choice, self.search
        num_bytes = sum(unit.num_bytes(choice[unit.name]) for unit in search.units)
        of_cache = search.cache.stored_bytes(choice[CACHE]) if search.cache else 0
        return search.other_bytes + num_bytes + of_cache

    def cache_bytes(self, choice: Choice | None = None) -> int:
        """Bytes of the cache that the budget has room for, by this or another choice."""
        choice, cache = choice or self.choice, self.search.cache
        return cache.tokens * cache.token_bytes(choice[CACHE]) if cache else 0

    def divergence(self, choice: Choice | None = None) -> float:
        """The sum of what this or another choice costs unit by unit, in nats per token."""
        return sum(self.divergences[item] for item in (choice or self.choice).items())

    def everywhere(self, candidate: str) -> Choice:
        """The choice of one candidate for all that it can be chosen for."""
        return {
            unit.name: candidate if candidate in unit.candidates else UNCOMPRESSED
            for unit in self.search.choices
        }

    def describe_size(self, choice: Choice | None = None) -> str:
        """Bits per weight of this or another choice; for a budget in bytes, these too."""
        text = f"{self.bits(choice):.2f} bits per weight"
        if self.search.budget.num_bytes is not None:
            text += f", {format_bytes(self.weight_bytes(choice))} of weights"
        if self.search.cache is not None:
            text += f", {format_bytes(self.cache_bytes(choice))} of cache"
        return text


def render_recipe(result: SearchResult) -> str:
    """The TOML file: for each candidate the layers that get it, those that must stay together on
    one line.
    """
    lines, search = list(_render_head(result)), result.search
    if search.cache is not None:
        lines += ["", *_render_cache(result, search.cache)]
    for candidate in search.candidates:
        units = [unit for unit in search.units if result.choice[unit.name] == candidate]
        in_blocks = [unit for unit in units if unit.block is not None]
        if in_blocks:
            lines += ["", *_render_rule(result, in_blocks)]
    for unit in search.units:
        if unit.block is None:
            lines += ["", *_render_outer_rule(result, unit)]
    return "\n".join(lines) + "\n"


def _render_head(result: SearchResult) -> Iterator[str]:
    search = result.search
    schemes = [*search.candidates, *(search.cache.trials if search.cache else ())]
    options = f"--budget {search.budget.text} --schemes {','.join(schemes)}"
    if search.cache is not None:
        options += f" --cache-tokens {search.cache.tokens}"
    yield f"# by bitpress {__version__}: search {_quote(search.model)} {options}"
    yield (
        f"# {result.describe_size()}, expected KL divergence {result.divergence():.6f} nats per "
        "token"
    )
    for name in search.candidates:
        choice = result.everywhere(name)
        size, divergence = result.describe_size(choice), result.divergence(choice)
        yield f"# {name} everywhere: {size}, {divergence:.6f}"
    yield "#"
    yield (
        "# What a line costs by itself, in nats per token, stands behind it: measured on "
        f"{result.tokens:,} tokens of"
    )
    yield (
        f"# {_quote(search.calibration.source)}. A line may be moved to another list; what is on "
        "one line must get the same steps."
    )


def _render_rule(result: SearchResult, units: Sequence[SearchUnit]) -> Iterator[str]:
    """The rule of units that get the same steps."""
    yield "[[layers]]"
    yield "match = ["
    for unit in units:
        patterns = " ".join(f"{_quote(pattern)}," for pattern in unit.patterns)
        yield f"    {patterns}  # {_list_costs(result, unit)}"
    yield "]"
    unit = units[0]
    # the options of a head that a rule leaves out depend on other rules
    efforts = {NORMAL_EFFORT} if unit.block is not None else {NORMAL_EFFORT, LEAST_EFFORT}
    steps = unit.stacks[result.choice[unit.name]][0].steps
    yield f"steps = [{', '.join(_render_step(step, efforts) for step in steps)}]"


def _render_outer_rule(result: SearchResult, unit: SearchUnit) -> Iterator[str]:
    """The rule of the head, or of the embeddings; a comment where they stay as they are."""
    if result.choice[unit.name] == UNCOMPRESSED:
        yield f"# {unit.patterns[0]} stays as it is: {_list_costs(result, unit)}"
        return
    yield from _render_rule(result, [unit])


def _render_cache(result: SearchResult, cache: CacheUnit) -> Iterator[str]:
    """How the cache is kept, and what it costs."""
    for name in cache.candidates:
        yield f"# cache, {name}: {cache.token_bytes(name):,} bytes of each token, " + (
            f"{result.divergences[CACHE, name]:.6f}"
        )
    if result.choice[CACHE] != UNCOMPRESSED:
        yield f"cache = {_render_step(cache.caches[0].step)}"


def _list_costs(result: SearchResult, unit: SearchUnit) -> str:
    return ", ".join(
        f"{name} {result.divergences[unit.name, name]:.6f}" for name in unit.candidates
    )


def _render_step(step: Step, efforts: Collection[str] = (NORMAL_EFFORT,)) -> str:
    """The scheme's name, or a table with the options that a rule does not have by itself.

    Args:
        efforts: levels that may decide what the rule leaves out.
    """
    defaults = [step.scheme.step(step.scheme.efforts.get(e, {})).options for e in efforts]
    options = {
        name: value
        for name, value in attrs.asdict(step.options).items()
        if any(value != getattr(default, name) for default in defaults)
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
