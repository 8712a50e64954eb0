"""All batches on their way through the blocks: as the compressed model makes them, and some of them
as the source does too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from attrs import frozen
from torch import Tensor, nn

from bitpress.compression.calibration.resumable_forward import Course, Walk, course
from bitpress.modeling.capture import BlockCall
from bitpress.modeling.hidden_states import HiddenStates
from bitpress.runtime.process_group import SINGLE_PROCESS, ProcessGroup


@frozen(eq=False)
class Arrival:
    """What a site is given of some tokens.

    Attributes:
        inputs: (tokens, in) as the compressed layers before it make them.
        reference: (tokens, in) as the source makes them; None where it is not asked.
        residual: (tokens, channels) the source's residual stream less the compressed model's,
            before what the site adds to it.
    """

    inputs: Tensor
    reference: Tensor | None = None
    residual: Tensor | None = None

    @classmethod
    def joined(cls, arrivals: Sequence[Arrival]) -> Arrival:
        """Several as one, alike in what they have."""
        if len(arrivals) == 1:
            return arrivals[0]
        first = arrivals[0]
        return cls(
            torch.cat([a.inputs for a in arrivals]),
            None
            if first.reference is None
            else torch.cat([a.reference for a in arrivals if a.reference is not None]),
            None
            if first.residual is None
            else torch.cat([a.residual for a in arrivals if a.residual is not None]),
        )

    def only(self, chosen: Tensor) -> Arrival:
        """The chosen tokens, (tokens,) bool."""
        reference, residual = (
            None if t is None else t[chosen] for t in (self.reference, self.residual)
        )
        return Arrival(self.inputs[chosen], reference, residual)


class Streams:
    """Hidden states before a block, and the walks through it.

    Args:
        states: of every batch, as the compressed blocks make them.
        reference: of the chosen batches, as the source's blocks make them; None where nobody asks
            for them.
        chosen: which batches these are.
        waiting: how many forwards may wait inside a block; others start anew for every site.
        process_group: whose ranks share all batches; these are one of theirs.
        allowed: bytes of memory that may be held beyond what the interpreter takes.
    """

    def __init__(
        self,
        states: HiddenStates,
        reference: HiddenStates | None,
        chosen: Sequence[int],
        waiting: int,
        device: torch.device,
        process_group: ProcessGroup = SINGLE_PROCESS,
        allowed: int = 0,
    ) -> None:
        self.process_group = process_group
        self.states, self.reference, self.chosen, self.waiting = states, reference, chosen, waiting
        self.device, self.allowed = device, allowed
        self._walks: list[Walk] = []
        self._source_walks: dict[int, Walk] = {}
        self._courses: dict[tuple[object, ...], Course] = {}

    def enter(self, block: nn.Module, source: nn.Module | None, calls: Sequence[BlockCall]) -> None:
        """Stand before a block; `source` is the same with the weights it came with."""
        self.block, self.source, self.calls = block, source, calls
        self._walks = [self.walk(i, streaming=i in self.chosen) for i in range(len(calls))]
        self._source_walks = {}
        if source is not None and self.reference is not None:
            for place, i in enumerate(self.chosen):
                self._source_walks[i] = Walk(
                    source, calls[i], self._reader(self.reference, place), streaming=True
                )

    def walk(self, batch: int, streaming: bool = False) -> Walk:
        """A new walk of a batch through the block."""
        return Walk(self.block, self.calls[batch], self._reader(self.states, batch), streaming)

    def sample(self) -> tuple[BlockCall, Tensor]:
        """The first batch's call and hidden states."""
        return self.calls[0], self.states[0].to(self.device)

    def course(self, names: Sequence[str]) -> Course:
        """How the first rank's first batch comes through the block; blocks that are built alike are
        asked once.
        """
        kind = (type(self.block), *names)
        if kind in self._courses:
            return self._courses[kind]
        found = self.process_group.broadcast_object(course(self.block, names, *self.sample()))
        if len(found.called) == len(names):
            self._courses[kind] = found
        return found

    def arrivals(self, site: int, writes: bool) -> Iterator[Arrival]:
        """Per batch what a site is given; batches that the source is asked for come first.

        Args:
            writes: whether the site's output is added to the residual stream.
        """
        left = self.waiting
        for i in sorted(range(len(self._walks)), key=lambda i: i not in self._source_walks):
            walk, other = self._walks[i], self._source_walks.get(i)
            left -= 1 if other is None else 2
            keep = left >= 0
            inputs, now = walk.input(site, keep)
            reference, before = (None, None) if other is None else other.input(site, keep)
            if inputs is None:
                continue
            # or the source sends other tokens there
            if reference is None or reference.shape != inputs.shape:
                yield Arrival(inputs)
            else:
                behind = None if before is None or now is None or not writes else before - now
                yield Arrival(inputs, reference, behind)

    def leave(self, last: bool = False) -> float | None:
        """Go on to the block's outputs; ||h - h'|| / ||h'|| of the batches whose h' the source
        makes too, None without such.

        Args:
            last: nobody needs the outputs of this block but for that figure.
        """
        for i in self._source_walks if last else range(len(self._walks)):
            self.states[i] = self._walks[i].output()
        moved = size = 0.0
        for place, (i, walk) in enumerate(self._source_walks.items()):
            assert self.reference is not None
            found = self.reference[place] = walk.output()
            moved += float(
                (self.states[i].to(found.device) - found).square().sum(dtype=torch.float64)
            )
            size += float(found.square().sum(dtype=torch.float64))
        moved, size = (
            sum(parts)
            for parts in zip(*self.process_group.all_gather_object((moved, size)), strict=True)
        )
        self._walks, self._source_walks = [], {}
        del self.block, self.source, self.calls
        return math.sqrt(moved / size) if size else None

    def _reader(self, states: HiddenStates, place: int) -> Callable[[], Tensor]:
        return lambda: states[place].to(self.device)
