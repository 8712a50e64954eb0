"""Work on several items side by side in one thread, where what all of them ask for is computed at
once, with a batch axis: a GPU takes as long to start a kernel for one item as for all.

Each item's work is a coroutine (greenlet). It runs until it asks for something that can be batched;
when all of them have asked or are done, what is alike is computed.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextvars import ContextVar
from typing import Any, TypeVar

import greenlet
import torch
from attrs import frozen
from torch import Tensor

Item = TypeVar("Item")
Result = TypeVar("Result")


@frozen(eq=False)
class _Request:
    """What a coroutine asks for."""

    compute: Callable[[Sequence[Any]], Sequence[Any]]
    argument: Any
    key: Hashable


@frozen(eq=False)
class _Batch:
    """The answer to the first of several requests that are alike: it computes for all."""

    arguments: Sequence[Any]


# Where a coroutine hands out what it asks for.
_HUB: ContextVar[greenlet.greenlet | None] = ContextVar("_HUB", default=None)


def batched(
    compute: Callable[[Sequence[Item]], Sequence[Result]], argument: Item, key: Hashable
) -> Result:
    """What a function makes of an argument, with those of other coroutines that ask for the same.

    Args:
        compute: from several arguments to a result for each.
        key: equal for arguments that can be computed together.
    """
    hub = _HUB.get()
    if hub is None:
        (result,) = compute([argument])
        return result
    answer = hub.switch(_Request(compute, argument, key))
    if isinstance(answer, _Batch):
        answer = hub.switch(compute(answer.arguments))
    return answer.pop()  # type: ignore[no-any-return]


def read_number(x: Tensor) -> float:
    """The number in a tensor without axes, with those of other coroutines that ask for one: the
    host waits for a device once for all of them.
    """
    return batched(_read_numbers, x, (x.dtype, x.device))


def _read_numbers(numbers: Sequence[Tensor]) -> list[float]:
    if len(numbers) == 1:
        return [numbers[0].item()]
    return torch.stack(list(numbers)).tolist()


def stack(of_items: Sequence[Tensor], axis: int = 0) -> Tensor:
    """Tensors of items with an axis for the items; a single one is not copied."""
    first = of_items[0]
    return first.unsqueeze(axis) if len(of_items) == 1 else torch.stack(list(of_items), axis)


def map_batched(work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """What the work makes of each item; what it asks `batched` for is computed for several items at
    once. An error in one ends all.
    """
    coroutines = [_start(work) for _ in items]
    results: dict[int, Result] = {}
    answers: Iterable[tuple[int, Any]] = enumerate(items)
    try:
        while len(results) < len(coroutines):
            requests: dict[int, _Request] = {}
            for number, answer in answers:
                made = coroutines[number].switch(answer)
                if coroutines[number].dead:
                    results[number] = made
                else:
                    requests[number] = made
            answers = _answer(requests, coroutines)
    finally:
        for coroutine in coroutines:
            coroutine.throw()
    return [results[number] for number in range(len(coroutines))]


def _start(work: Callable[[Any], Any]) -> greenlet.greenlet:
    """A coroutine that hands out what it asks for where this is called."""
    coroutine = greenlet.greenlet(work)
    coroutine.gr_context = contextvars.copy_context()
    coroutine.gr_context.run(_HUB.set, greenlet.getcurrent())
    return coroutine


def _answer(
    requests: dict[int, _Request], coroutines: Sequence[greenlet.greenlet]
) -> list[tuple[int, Any]]:
    """What each coroutine is answered that has asked, those that ask for the same together, in a
    list that it takes it out of: nothing else holds it.
    """
    alike: dict[Hashable, list[int]] = {}
    for number, request in requests.items():
        alike.setdefault((request.compute, request.key), []).append(number)
    answers: list[tuple[int, Any]] = []
    for numbers in alike.values():
        # taken out of what would hold them
        batch = _Batch([requests.pop(number).argument for number in numbers])
        made = coroutines[numbers[0]].switch(batch)
        answers += zip(numbers, ([result] for result in made), strict=True)
    return answers
