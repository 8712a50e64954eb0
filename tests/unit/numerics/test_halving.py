"""Errors of every column are fed to every later one before that is decided, once."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise

import pytest

from bitpress.numerics.halving import halve

WIDTHS = [*range(1, 41), 64, 70, 100]
UNITS = [(1, 1), (4, 4), (8, 2), (16, 4)]


@pytest.mark.parametrize(("unit", "leaf"), UNITS)
def test_every_column_is_decided_once_after_all_before_it_were_fed_to_it(
    unit: int, leaf: int
) -> None:
    for width in WIDTHS:
        # of each column, those whose errors it has had
        fed: dict[int, list[int]] = defaultdict(list)
        decided: list[int] = []
        for start, middle, stop in halve(0, width, unit, leaf):
            if middle < stop:
                for column in range(middle, stop):
                    fed[column] += range(start, middle)
                continue
            assert stop - start <= leaf
            for column in range(start, stop):
                # a leaf feeds its own columns
                assert [*fed[column], *range(start, column)] == decided
                decided.append(column)
        assert decided == list(range(width))


@pytest.mark.parametrize(("unit", "leaf"), UNITS)
def test_steps_of_as_many_columns_are_at_equal_distances(unit: int, leaf: int) -> None:
    for width in WIDTHS:
        places: dict[tuple[int, int], list[int]] = defaultdict(list)
        for start, middle, stop in halve(0, width, unit, leaf):
            if middle < stop and stop - start > unit:
                places[middle - start, stop - middle].append(middle)
        for middles in places.values():
            distances = {later - own for own, later in pairwise(middles)}
            assert len(distances) <= 1, (width, middles)
