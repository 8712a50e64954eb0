"""A search before it starts, and what it has found."""

from __future__ import annotations

from collections.abc import Mapping

from attrs import frozen

from bitpress.budget.damage import Damages
from bitpress.budget.units import Unit
from bitpress.calibrate.texts import Sequences
from bitpress.planning import Plan
from bitpress.schemes import Step


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
