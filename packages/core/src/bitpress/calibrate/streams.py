"""All batches on their way through the blocks: as the compressed model makes them, and some of them as the source does too."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from bitpress.calibrate.recorder import Call
from bitpress.calibrate.states import States
from bitpress.calibrate.walk import Walk


class Streams:
    """Hidden states before a block, and the walks through it.

    Args:
        states: of every batch, as the compressed blocks make them.
        reference: of the chosen batches, as the source's blocks make them; None where nobody asks for them.
        chosen: which batches these are.
        keep: whether forwards wait inside a block instead of starting anew for every site.
    """

    def __init__(self, states: States, reference: States | None, chosen: Sequence[int], keep: bool, device: torch.device) -> None:
        self.states, self.reference, self.chosen, self.keep = states, reference, chosen, keep
        self._device = device
        self._walks: list[Walk] = []
        self._source_walks: dict[int, Walk] = {}

    def enter(self, block: nn.Module, source: nn.Module | None, calls: Sequence[Call]) -> None:
        """Stand before a block; `source` is the same with the weights it came with."""
        self.block, self.source, self.calls = block, source, calls
        self._walks = [self.walk(i) for i in range(len(calls))]
        self._source_walks = {}
        if source is not None and self.reference is not None:
            for place, i in enumerate(self.chosen):
                self._source_walks[i] = Walk(source, calls[i], self._reader(self.reference, place))

    def walk(self, batch: int) -> Walk:
        """A new walk of a batch through the block."""
        return Walk(self.block, self.calls[batch], self._reader(self.states, batch))

    def sample(self) -> tuple[Call, Tensor]:
        """The first batch's call and hidden states."""
        return self.calls[0], self.states[0].to(self._device)

    def inputs(self, site: int) -> Iterator[tuple[Tensor | None, Tensor | None]]:
        """Per batch the inputs (tokens, in) of a site: as the compressed layers before it make them, and as the source does."""
        for i, walk in enumerate(self._walks):
            other = self._source_walks.get(i)
            yield walk.input(site, self.keep), None if other is None else other.input(site, self.keep)

    def leave(self) -> None:
        """Go on to the block's outputs."""
        for i, walk in enumerate(self._walks):
            self.states[i] = walk.output()
        for place, walk in enumerate(self._source_walks.values()):
            assert self.reference is not None
            self.reference[place] = walk.output()
        self._walks, self._source_walks = [], {}
        del self.block, self.source, self.calls

    def _reader(self, states: States, place: int) -> Callable[[], Tensor]:
        return lambda: states[place].to(self._device)
