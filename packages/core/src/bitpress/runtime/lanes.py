"""Work side by side on the cores of a CPU, in pieces so large that threads need not wait for each
other.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


class Lanes(AbstractContextManager["Lanes"]):
    """Threads that work side by side, without gradients; one lane is the thread that asks.

    What is made does not depend on how many there are, if torch computes an operation with one
    thread: results come in the order of what they are made of.

    Args:
        num_lanes: at least one.
    """

    def __init__(self, num_lanes: int = 1) -> None:
        self.num_lanes = num_lanes
        # a pool of one thread is a queue of its own
        self._threads = [
            ThreadPoolExecutor(1, "lane", torch.set_grad_enabled, (False,))
            for _ in range(num_lanes if num_lanes > 1 else 0)
        ]

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for thread in self._threads:
            thread.shutdown(cancel_futures=True)

    @contextmanager
    def offer(self) -> Iterator[None]:
        """Let what this thread calls, however deep, ask for these lanes, until the block ends."""
        token = _OFFERED.set(self)
        try:
            yield
        finally:
            _OFFERED.reset(token)

    def map(self, work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """What the work makes of each item, in their order.

        An item's lane follows from its position alone. No more results than there are lanes wait to
        be taken.
        """
        if not self._threads:
            yield from map(work, items)
            return
        pending: deque[Future[Result]] = deque()
        threads = itertools.cycle(self._threads)
        try:
            for item in items:
                pending.append(next(threads).submit(work, item))
                # nothing here holds it while it waits
                del item
                if len(pending) == self.num_lanes:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
            wait(pending)


# A thread's own: a lane, which may not wait for others, is offered none.
_OFFERED: ContextVar[Lanes | None] = ContextVar("offered_lanes", default=None)


def offered_lanes() -> Lanes:
    """The lanes that a caller of this thread offers; one where nobody does."""
    return _OFFERED.get() or Lanes()
