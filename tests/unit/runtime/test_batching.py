"""Coroutines whose computations are made together: each gets what it would get alone."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from unittest.mock import patch

import pytest
import torch

from bitpress.runtime import batching
from bitpress.runtime.batching import batched, map_batched, read_number


class Squares:
    """Squares numbers, and keeps which were squared together."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def __call__(self, numbers: Sequence[int]) -> list[int]:
        self.batches.append(list(numbers))
        return [number**2 for number in numbers]


@pytest.mark.parametrize("items", [[], [3], [5, 1, 4, 2]])
def test_each_result_is_what_the_work_makes_of_its_item_alone(items: list[int]) -> None:
    def work(item: int) -> int:
        # as often as the item says
        for _ in range(item):
            item = batched(lambda numbers: [2 * number for number in numbers], item, "double")
        return item

    assert map_batched(work, items) == [item * 2**item for item in items]


def test_what_all_wait_for_is_computed_once_and_what_some_wait_for_without_the_others() -> None:
    squares = Squares()

    def work(item: int) -> list[int]:
        return [batched(squares, item + k, "square") for k in range(item)]

    assert map_batched(work, [1, 3, 2]) == [[1], [9, 16, 25], [4, 9]]
    assert squares.batches == [[1, 3, 2], [4, 3], [5]]


def test_what_differs_in_its_key_or_its_function_is_computed_apart() -> None:
    squares, others = Squares(), Squares()

    def work(item: int) -> int:
        return batched(others if item == 4 else squares, item, item % 2)

    assert map_batched(work, [1, 2, 3, 4, 6]) == [1, 4, 9, 16, 36]
    assert squares.batches == [[1, 3], [2, 6]]
    assert others.batches == [[4]]


def test_numbers_that_several_ask_for_are_read_from_their_device_at_once() -> None:
    numbers = [torch.tensor(2.5), torch.tensor(-1.0), torch.tensor(True), torch.tensor(7)]

    def work(number: torch.Tensor) -> float:
        return read_number(number) + read_number(number.double())

    with patch.object(batching, "_read_numbers", wraps=batching._read_numbers) as read:
        assert map_batched(work, numbers) == [5.0, -2.0, 2.0, 14.0]
    # by their dtype
    assert sorted(len(call.args[0]) for call in read.call_args_list) == [1, 1, 2, 4]
    assert read_number(torch.tensor(0.5)) == 0.5


def test_alone_and_in_another_thread_each_is_computed_at_once() -> None:
    squares = Squares()
    results = []

    def work(item: int) -> None:
        thread = threading.Thread(target=lambda: results.append(batched(squares, item, None)))
        thread.start()
        thread.join()

    results.append(batched(squares, 7, None))
    map_batched(work, [1, 2])
    assert results == [49, 1, 4]
    assert squares.batches == [[7], [1], [2]]


def fail(numbers: Sequence[int]) -> list[int]:
    raise ValueError(f"of {list(numbers)}")


def fail_itself(item: int) -> int:
    if item == 2:
        raise ValueError("of 2 itself")
    return batched(Squares(), item, None)


@pytest.mark.parametrize(
    ("work", "message", "started"),
    [
        (lambda item: batched(fail, item, None), r"of \[1, 2, 3\]", [1, 2, 3]),
        (fail_itself, "of 2 itself", [1, 2]),
    ],
)
def test_an_error_of_one_ends_all(
    work: Callable[[int], int], message: str, started: list[int]
) -> None:
    ended = []

    def noted(item: int) -> int:
        try:
            return work(item)
        finally:
            ended.append(item)

    with pytest.raises(ValueError, match=message):
        map_batched(noted, [1, 2, 3])
    assert sorted(ended) == started


def test_each_has_context_variables_of_its_own_that_begin_as_the_callers() -> None:
    variable: ContextVar[str] = ContextVar("variable")
    variable.set("outside")
    seen = []

    def work(item: int) -> str:
        seen.append(variable.get())
        variable.set(str(item))
        batched(Squares(), item, None)
        return variable.get()

    assert map_batched(work, [1, 2]) == ["1", "2"]
    assert seen == ["outside"] * 2
    assert variable.get() == "outside"


class Large:
    """Something that should not be held longer than it is needed."""


def test_an_answer_is_held_by_nobody_but_who_has_asked() -> None:
    answers: list[weakref.ref[Large]] = []

    def make(numbers: Sequence[int]) -> list[Large]:
        made = [Large() for _ in numbers]
        answers.extend(map(weakref.ref, made))
        return made

    def work(item: int) -> int:
        answer = batched(make, item, "large")
        number = id(answer)
        del answer
        # the others still have theirs
        return number if answers[item]() is None else -1

    assert -1 not in map_batched(work, [0, 1, 2])


def test_an_argument_is_held_by_nobody_when_its_answer_is_there() -> None:
    arguments: list[weakref.ref[Large]] = []

    def work(item: int) -> bool:
        argument = Large()
        arguments.append(weakref.ref(argument))
        batched(lambda given: given, None, "wait for all")
        batched(use, argument, "use")
        del argument
        return arguments[item]() is None

    def use(given: Sequence[Large]) -> Sequence[None]:
        return [None for _ in given]

    assert map_batched(work, [0, 1, 2]) == [True] * 3
