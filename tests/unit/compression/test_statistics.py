"""The statistics of several ranks, added up."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bitpress import SchemeError, Statistic
from bitpress.compression.calibration.statistics import reduce_statistics


def test_statistics_that_cannot_be_added_up_are_described_in_words() -> None:
    gathered: list[Any] = []

    def gather_from_both(specs: Any) -> list[Any]:
        gathered.append(specs)
        return gathered

    # Both ranks in one process: the second gathers what the first has said as well.
    ranks: Any = SimpleNamespace(world_size=2, rank=0, all_gather_object=gather_from_both)
    ranks.agreeing = contextlib.nullcontext
    ranks.reduce = lambda value, owner, merge: None
    device = torch.device("cpu")
    reduce_statistics(ranks, [{"x": Statistic(torch.zeros(3, 3), "sum")}], 0, device)
    with pytest.raises(SchemeError) as error:
        reduce_statistics(ranks, [{"x": Statistic(torch.zeros(4), "max")}], 0, device)
    assert str(error.value) == (
        "statistics 'x' of two ranks are sum of float32 [3, 3] on cpu and max of float32 [4] on "
        "cpu, and cannot be added up"
    )
