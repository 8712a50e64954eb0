"""Forwards of one block that stop before its linear layers and go on when those have been decided.

A forward is a coroutine of its own (greenlet): when a site (layers that read one input) is reached
it hands the input out and waits. Kept waiting, a block costs one forward however many sites it has,
and its waiting forwards hold a few tensors for each token; not kept, it is run from its start for
every site, and holds nothing.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import greenlet
import torch
from attrs import frozen
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bitpress.modeling.capture import BlockCall

# of a block's output: by how much sums in another order may differ
SAME = 1e-5

# layers of which some are looked for that add up to what a block does
MOST = 6


class _Forward(greenlet.greenlet):
    """A forward of a block. Nothing that it runs holds it, so that one that is given up ends, and
    lets go of the block.

    Attributes:
        stream: the block's input and what layers have added to it so far; None where it is not
            noted.
    """

    stream: Tensor | None = None

    def __init__(
        self, block: nn.Module, call: BlockCall, hidden: Callable[[], Tensor], streaming: bool
    ) -> None:
        super().__init__(functools.partial(_forward, block, call, hidden, streaming))


def _forward(
    block: nn.Module, call: BlockCall, hidden: Callable[[], Tensor], streaming: bool
) -> Tensor:
    given = hidden()
    if streaming:
        greenlet.getcurrent().stream = given  # type: ignore[attr-defined]
    return call(block, given)


class Walk:
    """One batch's way through a block.

    Args:
        streaming: whether what layers add to the block's input is noted on the way.
    """

    def __init__(
        self,
        block: nn.Module,
        call: BlockCall,
        hidden: Callable[[], Tensor],
        streaming: bool = False,
    ) -> None:
        self._start = lambda: _Forward(block, call, hidden, streaming)
        self._run: _Forward | None = None
        self._at: tuple[int, Tensor | None] = (-1, None)

    def input(self, site: int, keep: bool) -> tuple[Tensor | None, Tensor | None]:
        """The input (tokens, in) of a site, sites being asked for in order; None where the forward
        does not pass it.

        Beside it the residual stream (tokens, channels) by then, if the walk is a streaming one.

        Args:
            keep: wait there, and go on from there when asked again.
        """
        run = self._run or self._start()  # type: ignore[no-untyped-call]
        while self._at[0] < site and not run.dead:
            arrived = run.switch()
            if not run.dead:
                self._at = arrived
        number, found = self._at
        stream = None if run.stream is None else run.stream.flatten(0, -2)
        if keep:
            self._run = run
        else:
            self._at = (-1, None)
            run.throw()
        return (found, stream) if number == site else (None, None)

    def output(self) -> Tensor:
        """The block's output; the walk is over."""
        run, self._run, self._at = self._run or self._start(), None, (-1, None)  # type: ignore[no-untyped-call]
        while True:
            found = run.switch()
            if run.dead:
                return found  # type: ignore[no-any-return]


class Doors:
    """The places of a block where walks stop: before the first layer of every site; and where they
    note what is added.

    Args:
        sites: each site's first layer.
        writers: layers whose outputs are added to the block's input.
    """

    def __init__(self, block: nn.Module, sites: Sequence[str], writers: Sequence[str] = ()) -> None:
        self._handles: list[RemovableHandle] = []
        main = greenlet.getcurrent()
        for number, name in enumerate(sites):

            def stop(
                module: nn.Module, arguments: tuple[Tensor, ...], number: int = number
            ) -> None:
                if greenlet.getcurrent() is not main:
                    main.switch((number, arguments[0].flatten(0, -2)))

            self._handles.append(block.get_submodule(name).register_forward_pre_hook(stop))
        for name in writers:
            self._handles.append(block.get_submodule(name).register_forward_hook(_add))

    def close(self) -> None:
        """Take the stops away."""
        for handle in self._handles:
            handle.remove()


def _add(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
    run = greenlet.getcurrent()
    if isinstance(run, _Forward) and run.stream is not None:
        # some blocks have laid all tokens in one row
        run.stream = run.stream + output.view_as(run.stream)


@frozen
class Course:
    """How a forward goes through a block.

    Attributes:
        called: those of the asked layers that it calls, in the order of their first calls.
        writers: those of them whose outputs, added to the block's input, make its output; none
            where it is made otherwise.
    """

    called: tuple[str, ...]
    writers: tuple[str, ...]


def course(block: nn.Module, names: Sequence[str], call: BlockCall, hidden: Tensor) -> Course:
    """The course of a forward, found by running one."""
    called: dict[str, Tensor | None] = {}

    def note(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, arguments: Any, output: Tensor) -> None:
            # some blocks add to an output in place
            if name not in called:
                called[name] = (
                    output.reshape(hidden.shape).clone()
                    if output.numel() == hidden.numel()
                    else None
                )

        return hook

    handles = [block.get_submodule(name).register_forward_hook(note(name)) for name in names]
    found = call(block, hidden)
    for handle in handles:
        handle.remove()
    added = {name: output for name, output in called.items() if output is not None}
    return Course(tuple(called), _writers(added, hidden, found))


def _writers(outputs: Mapping[str, Tensor], hidden: Tensor, found: Tensor) -> tuple[str, ...]:
    """Those layers whose outputs are what a block has added to its input."""
    last = list(outputs)[-MOST:]
    for count in range(len(last), 0, -1):
        for names in itertools.combinations(last, count):
            left = found - sum((outputs[name] for name in names), hidden)
            if torch.linalg.norm(left) <= SAME * torch.linalg.norm(found):
                return names
    return ()
