"""Lanes: work side by side whose results come in the order of what they are made of."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from bitpress.runtime.lanes import Lanes, offered_lanes

COUNTS = [1, 2, 3, 16]


@pytest.mark.parametrize("num_lanes", COUNTS)
def test_results_come_in_the_order_of_the_items_and_position_alone_chooses_the_lane(
    num_lanes: int,
) -> None:
    first_items, lane_of = list(range(40)), {}

    def work(item: int) -> tuple[int, int]:
        return item, threading.get_ident()

    with Lanes(num_lanes) as lanes:
        for _ in range(2):
            results = list(lanes.map(work, first_items))
            assert [item for item, _ in results] == first_items
            for item, thread in results:
                assert lane_of.setdefault(item, thread) == thread
                assert thread == lane_of[item % num_lanes]
    assert len(set(lane_of.values())) == num_lanes


@pytest.mark.parametrize("num_lanes", [2, 16])
def test_as_many_pieces_of_work_run_at_once_as_there_are_lanes(num_lanes: int) -> None:
    # it breaks unless all of them come to it
    meeting = threading.Barrier(num_lanes, timeout=20)
    with Lanes(num_lanes) as lanes:
        assert len(list(lanes.map(lambda item: meeting.wait(), range(2 * num_lanes)))) > num_lanes


@pytest.mark.parametrize("num_lanes", COUNTS)
def test_no_more_items_are_begun_than_may_wait(num_lanes: int) -> None:
    begun = []

    def items() -> Iterator[int]:
        for item in range(50):
            begun.append(item)
            yield item

    with Lanes(num_lanes) as lanes:
        for number, _ in enumerate(lanes.map(str, items())):
            assert len(begun) <= number + num_lanes


@pytest.mark.parametrize("num_lanes", COUNTS)
def test_what_fails_in_a_lane_fails_where_it_is_asked_for_and_the_lanes_end(num_lanes: int) -> None:
    threads = threading.active_count()
    with pytest.raises(ZeroDivisionError), Lanes(num_lanes) as lanes:
        list(lanes.map(lambda item: 1 / (5 - item), range(40)))
    assert threading.active_count() == threads


@pytest.mark.parametrize("num_lanes", COUNTS)
def test_lanes_make_no_gradients_where_the_thread_that_asks_makes_none(num_lanes: int) -> None:
    weight = torch.ones(3, requires_grad=True)
    with torch.no_grad(), Lanes(num_lanes) as lanes:
        results = list(lanes.map(lambda item: item * weight, range(4)))
    assert not any(result.requires_grad for result in results)


def test_lanes_are_offered_to_what_a_thread_calls_and_to_no_lane() -> None:
    with Lanes(2) as lanes:
        with lanes.offer():
            assert offered_lanes() is lanes
            counts = list(lanes.map(lambda item: offered_lanes().num_lanes, range(3)))
        assert counts == [1, 1, 1]
        assert offered_lanes().num_lanes == 1
