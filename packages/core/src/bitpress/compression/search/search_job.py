"""What a search is to do."""

from __future__ import annotations

from collections.abc import Mapping

from attrs import frozen

from bitpress.compression.search.candidates import SearchUnit
from bitpress.modeling.tokens import CalibrationData
from bitpress.planning.plan import Plan
from bitpress.schemes.registry import Step

# KL divergence in nats per token, by unit and candidate.
Divergences = Mapping[tuple[str, str], float]


@frozen(eq=False)
class SearchJob:
    """What headers say of a search, and the texts that it will measure on.

    Attributes:
        model: its name as the user gave it.
        candidates: by name their steps; none where one leaves layers as they are.
        plans: of those with steps, everywhere.
        units: what a candidate is chosen for.
        budget: stored bits per weight, to two decimals.
        max_bytes: the same as bytes of all units.
        calibration: the sequences that candidates are fitted to and judged on.
        notes: of the recipe of all candidates.
    """

    model: str
    candidates: Mapping[str, tuple[Step, ...]]
    plans: Mapping[str, Plan]
    units: tuple[SearchUnit, ...]
    budget: float
    max_bytes: int
    calibration: CalibrationData
    notes: tuple[str, ...] = ()

    @property
    def plan(self) -> Plan:
        """That of any candidate: where the model lies, and how it is built."""
        return next(iter(self.plans.values()))
