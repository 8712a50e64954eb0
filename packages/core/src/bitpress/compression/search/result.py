"""What a search found, and the recipe that it writes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import attrs
from attrs import frozen

from bitpress.compression.search.candidates import Unit
from bitpress.compression.search.sensitivity import Damages
from bitpress.modeling.tokens import Sequences
from bitpress.planning.plan import Plan
from bitpress.runtime.version import __version__
from bitpress.schemes.registry import Step


@frozen(eq=False)
class Search:
    """What headers say of it, and the texts that it will be measured on.

    Attributes:
        model: as it was named.
        candidates: by name their steps; none where one leaves layers as they are.
        plans: of those with steps, everywhere.
        budget: stored bits per weight, to two decimals.
        limit: the same as bytes of all layers.
    """

    model: str
    candidates: Mapping[str, tuple[Step, ...]]
    plans: Mapping[str, Plan]
    units: tuple[Unit, ...]
    budget: float
    limit: int
    data: Sequences

    @property
    def plan(self) -> Plan:
        """Of any candidate."""
        return next(iter(self.plans.values()))


@frozen(eq=False)
class Found:
    """A choice.

    Attributes:
        chosen: by unit the candidate.
        damages: by unit and candidate, in nats per token.
        tokens: on which they were measured.
    """

    search: Search
    chosen: Mapping[str, str]
    damages: Damages
    tokens: int

    def bits(self, chosen: Mapping[str, str] | None = None) -> float:
        """Stored bits per weight of this or another choice, scales included."""
        chosen, units = chosen or self.chosen, self.search.units
        return 8 * sum(u.size(chosen[u.name]) for u in units) / sum(u.weights for u in units)

    def damage(self, chosen: Mapping[str, str] | None = None) -> float:
        """The sum of the damages of this or another choice."""
        return sum(self.damages[choice] for choice in (chosen or self.chosen).items())

    def everywhere(self, candidate: str) -> Mapping[str, str]:
        """The choice of one candidate for all."""
        return dict.fromkeys(self.chosen, candidate)


def text(found: Found) -> str:
    """The TOML file: for each candidate the layers that get it, those that must stay together on
    one line.
    """
    return "\n".join(_lines(found)) + "\n"


def _lines(found: Found) -> Iterator[str]:
    search = found.search
    others = [name for name in search.candidates if name in found.chosen.values()]
    asked = f"--budget {search.budget:g} --schemes {','.join(search.candidates)}"
    yield f"# by bitpress {__version__}: search {_quoted(search.model)} {asked}"
    yield (
        f"# {found.bits():.2f} bits per weight, expected KL divergence {found.damage():.6f} nats "
        "per token"
    )
    for name in search.candidates:
        same = found.everywhere(name)
        yield (
            f"# {name} everywhere: {found.bits(same):.2f} bits per weight, {found.damage(same):.6f}"
        )
    yield "#"
    yield (
        "# What a line costs by itself, in nats per token, stands behind it: measured on "
        f"{found.tokens:,} tokens of"
    )
    yield (
        f"# {_quoted(search.data.source)}. A line may be moved to another list; what is on one "
        "line must get the same steps."
    )
    for name in others:
        yield ""
        yield "[[layers]]"
        yield "match = ["
        for unit in search.units:
            if found.chosen[unit.name] == name:
                costs = ", ".join(
                    f"{n} {found.damages[unit.name, n]:.6f}" for n in search.candidates
                )
                yield (
                    f"    {' '.join(f'{_quoted(pattern)},' for pattern in unit.patterns)}  # "
                    f"{costs}"
                )
        yield "]"
        yield f"steps = [{', '.join(map(_step, search.candidates[name]))}]"


def _step(step: Step) -> str:
    """The scheme's name, or a table with the options that are not the default ones."""
    usual, options = step.scheme.step().options, attrs.asdict(step.options)
    set_ = {name: value for name, value in options.items() if value != getattr(usual, name)}
    if not set_:
        return _quoted(step.scheme.name)
    return (
        f"{{ use = {_quoted(step.scheme.name)}, "
        f"{', '.join(f'{name} = {_quoted(value)}' for name, value in set_.items())} }}"
    )


def _quoted(value: Any) -> str:
    """As TOML, which takes JSON's numbers, lists and (but for characters that no name has)
    strings.
    """
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
