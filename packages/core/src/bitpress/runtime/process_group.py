"""The processes that share a run (ranks), on torch.distributed. One process is a run of one rank:
the code is the same.

Ranks meet in collectives, all in the same order. A rank that fails does not come to the next
meeting; it says why, and whoever waits for it is ended (`launch`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from attrs import frozen
from torch import Tensor

from bitpress.errors import BitpressError, memory_is_full

Item = TypeVar("Item")

GOES_ON = "the same command goes on from what is finished"


class RankError(BitpressError):
    """Another rank of the run has ended."""


@frozen
class Ranks:
    """What a rank knows of the run.

    Attributes:
        rank: its own number.
        count: of all ranks.
        beside: ranks on this machine, this one included.
        local: its number among them.
    """

    rank: int = 0
    count: int = 1
    beside: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        """Whether it is the one that prepares the output, speaks to the user and writes what all
        have found.
        """
        return self.rank == 0

    def device(self, name: str) -> str:
        """The device of this rank, where one was named for all: each its own GPU."""
        return f"cuda:{self.local}" if name == "cuda" and self.count > 1 else name

    def deal(self, items: Sequence[Item], size: Callable[[Item], int]) -> list[Item]:
        """A rank's share of items, in their order: the largest are dealt first, each to the rank
        that has the least by then.
        """
        loads, own = [0] * self.count, []
        for i in sorted(range(len(items)), key=lambda i: -size(items[i])):
            rank = loads.index(min(loads))
            loads[rank] += size(items[i])
            if rank == self.rank:
                own.append(i)
        return [items[i] for i in sorted(own)]

    def part(self, items: Sequence[Item]) -> range:
        """Places of a rank's share of items, where neighbors stay together: shares differ by one
        item at most.
        """
        return range(
            self.rank * len(items) // self.count, (self.rank + 1) * len(items) // self.count
        )

    def wait(self) -> None:
        """Until all ranks are here."""
        self.gather(None)

    def gather(self, value: Item) -> list[Item]:
        """Every rank's value, in the order of ranks."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        with _meeting():
            dist.all_gather_object(found, value)
        return found

    def same(self, value: Item, source: int = 0) -> Item:
        """One rank's value, for all."""
        if self.count == 1:
            return value
        found = [value]
        with _meeting():
            dist.broadcast_object_list(found, source)
        return found[0]

    def share(self, tensor: Tensor, source: int) -> Tensor:
        """One rank's numbers; the others give a tensor of that dtype and shape, to hold them."""
        if self.count == 1:
            return tensor
        tensor = tensor.contiguous()
        with _meeting():
            # its bytes: not every backend knows every dtype
            dist.broadcast(tensor.reshape(-1).view(torch.uint8), source)
        return tensor

    def any(self, tensor: Tensor | None, device: torch.device) -> Tensor | None:
        """The tensor of the last rank that has one, for all."""
        for rank, kind in reversed(
            list(enumerate(self.gather(None if tensor is None else (tensor.shape, tensor.dtype))))
        ):
            if kind is not None:
                mine = (
                    tensor
                    if rank == self.rank
                    else torch.empty(kind[0], dtype=kind[1], device=device)
                )
                assert mine is not None
                return self.share(mine, rank)
        return None

    def reduce(self, tensor: Tensor, owner: int, merge: Literal["sum", "max"]) -> None:
        """Add every rank's tensor up, or take the largest of each number, in the owner's own."""
        with _meeting():
            dist.reduce(tensor, owner, dist.ReduceOp.SUM if merge == "sum" else dist.ReduceOp.MAX)


ALONE = Ranks()


@contextlib.contextmanager
def _meeting() -> Iterator[None]:
    """A collective whose failure means that another rank does not take part any more."""
    try:
        yield
    except RuntimeError as e:
        if memory_is_full(e):
            raise
        fact = str(e).splitlines()[0].rpartition("] ")[2]
        raise RankError(
            f"another rank of the run has ended ({fact}): it, or torchrun, says which and why; "
            f"{GOES_ON}"
        ) from None
