"""Forwards of one block that stop before its linear layers and go on when those have been decided.

A forward is a coroutine of its own (greenlet): when a site (layers that read one input) is reached it hands the input out and
waits. Kept waiting, a block costs one forward however many sites it has, and its waiting forwards hold a few tensors for each
token; not kept, it is run from its start for every site, and holds nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import greenlet
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bitpress.calibrate.recorder import Call


class Walk:
    """One batch's way through a block."""

    def __init__(self, block: nn.Module, call: Call, hidden: Callable[[], Tensor]) -> None:
        self._start = lambda: greenlet.greenlet(lambda: call(block, hidden()))
        self._run: greenlet.greenlet | None = None
        self._at: tuple[int, Tensor | None] = (-1, None)

    def input(self, site: int, keep: bool) -> Tensor | None:
        """The input (tokens, in) of a site, sites being asked for in order; None where the forward does not pass it.

        Args:
            keep: wait there, and go on from there when asked again.
        """
        run = self._run or self._start()  # type: ignore[no-untyped-call]
        while self._at[0] < site and not run.dead:
            arrived = run.switch()
            if not run.dead:
                self._at = arrived
        number, found = self._at
        if keep:
            self._run = run
        else:
            self._at = (-1, None)
            run.throw()
        return found if number == site else None

    def output(self) -> Tensor:
        """The block's output; the walk is over."""
        run, self._run, self._at = self._run or self._start(), None, (-1, None)  # type: ignore[no-untyped-call]
        while True:
            found = run.switch()
            if run.dead:
                return found  # type: ignore[no-any-return]


class Doors:
    """The places of a block where walks stop: before the first layer of every site."""

    def __init__(self, block: nn.Module, sites: Sequence[str]) -> None:
        self._handles: list[RemovableHandle] = []
        main = greenlet.getcurrent()
        for number, name in enumerate(sites):

            def stop(module: nn.Module, arguments: tuple[Tensor, ...], number: int = number) -> None:
                if greenlet.getcurrent() is not main:
                    main.switch((number, arguments[0].flatten(0, -2)))

            self._handles.append(block.get_submodule(name).register_forward_pre_hook(stop))

    def close(self) -> None:
        """Take the stops away."""
        for handle in self._handles:
            handle.remove()


def order(block: nn.Module, names: Sequence[str], call: Call, hidden: Tensor) -> list[str]:
    """Those of the named layers that a forward calls, in the order of their first calls."""
    called: dict[str, None] = {}

    def note(name: str) -> Callable[[nn.Module, Any], None]:
        return lambda module, arguments: called.setdefault(name)

    handles = [block.get_submodule(name).register_forward_pre_hook(note(name)) for name in names]
    call(block, hidden)
    for handle in handles:
        handle.remove()
    return list(called)
