"""What a search is to do."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from attrs import frozen
from torch import Tensor

from bitpress.compression.search.candidates import Candidates
from bitpress.compression.search.units import CacheUnit, SearchUnit
from bitpress.modeling.tokens import CalibrationData
from bitpress.planning.plan import Plan
from bitpress.planning.search_goal import Budget

# Tokens on which candidates are judged.
JUDGED_TOKENS = 4096

# KL divergence in nats per token, by unit and candidate.
Divergences = Mapping[tuple[str, str], float]


@frozen(eq=False)
class SearchJob:
    """What headers say of a search, and the texts that it will measure on.

    Attributes:
        model: its name as the user gave it.
        candidates: for the layers of the decoder blocks.
        plans: of those with steps, everywhere.
        units: layers that a candidate is chosen for; the head and the embeddings come last.
        cache: of the tokens that the budget has room for; None where it has for none.
        budget: which choices are allowed.
        other_bytes: of all weights that none is chosen for.
        max_bytes: of all that one is chosen for.
        calibration: the sequences that candidates are fitted to and judged on.
        notes: of the recipe of all candidates, and of what is no choice.
    """

    model: str
    candidates: Candidates
    plans: Mapping[str, Plan]
    units: tuple[SearchUnit, ...]
    cache: CacheUnit | None
    budget: Budget
    other_bytes: int
    max_bytes: int
    calibration: CalibrationData
    notes: tuple[str, ...] = ()

    @property
    def choices(self) -> tuple[SearchUnit | CacheUnit, ...]:
        """All that a candidate is chosen for."""
        return self.units if self.cache is None else (*self.units, self.cache)

    @property
    def plan(self) -> Plan:
        """That of any candidate: where the model lies, and how it is built."""
        return next(iter(self.plans.values()))


def split_sequences(ids: Tensor) -> tuple[Tensor, Tensor]:
    """The sequences that candidates are fitted to, and those that they are judged on, which are
    spread over all. One alone serves for both.

    Args:
        ids: token ids, (sequences, length).
    """
    num_judged = min(max(JUDGED_TOKENS // ids.shape[1], 1), len(ids) // 2)
    if not num_judged:
        return ids, ids
    is_judged = torch.zeros(len(ids), dtype=torch.bool)
    is_judged[[i * len(ids) // num_judged for i in range(num_judged)]] = True
    return ids[~is_judged], ids[is_judged]
