"""One option of each unit under a limit: what is chosen is what trying all of them would choose."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from bitpress.compression.search.allocation import Option, choose_options

OPTIONS = st.builds(
    Option, st.integers(0, 12), st.sampled_from([0.0, 0.25, 1.0, 3.0]) | st.floats(0, 2)
)
UNITS = st.lists(st.lists(OPTIONS, min_size=1, max_size=4), min_size=1, max_size=5)


def size(units: Sequence[Sequence[Option]], chosen: Sequence[int]) -> int:
    return sum(options[i].size for options, i in zip(units, chosen, strict=True))


def cost(units: Sequence[Sequence[Option]], chosen: Sequence[int]) -> float:
    return sum(options[i].cost for options, i in zip(units, chosen, strict=True))


# a busy machine draws examples slowly
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(UNITS, st.integers(0, 50))
def test_no_choice_that_keeps_to_the_limit_has_less_cost(
    units: list[list[Option]], limit: int
) -> None:
    fitting = [
        c for c in itertools.product(*(range(len(u)) for u in units)) if size(units, c) <= limit
    ]
    if not fitting:
        with pytest.raises(ValueError, match="no choice"):
            choose_options(units, limit)
        return
    chosen = choose_options(units, limit)
    assert size(units, chosen) <= limit
    assert cost(units, chosen) == pytest.approx(
        min(cost(units, c) for c in fitting), rel=1e-9, abs=1e-12
    )


def by_table(units: Sequence[Sequence[Option]], limit: int) -> float:
    """The least cost by dynamic programming over every size."""
    least = [0.0] * (limit + 1)
    for options in units:
        least = [
            min((least[s - o.size] + o.cost for o in options if o.size <= s), default=float("inf"))
            for s in range(limit + 1)
        ]
    return least[limit]


@pytest.mark.parametrize("share", [0.02, 0.3, 0.8, 1.0])
def test_of_the_units_of_a_large_model_too(share: float) -> None:
    draw = random.Random(0)
    units = []
    # 40 blocks of 4 stacks
    for rows in draw.choices([3, 4, 11, 14], k=160):
        lost = draw.lognormvariate(0, 1.5)
        units.append(
            [
                Option(rows * bits, lost * draw.lognormvariate(0, 0.3) / 256**bits)
                for bits in (1, 2, 4)
            ]
        )
    least, most = (sum(ends(o.size for o in u) for u in units) for ends in (min, max))
    limit = int(least + share * (most - least))
    chosen = choose_options(units, limit)
    assert size(units, chosen) <= limit
    assert cost(units, chosen) == pytest.approx(by_table(units, limit), rel=1e-9)
