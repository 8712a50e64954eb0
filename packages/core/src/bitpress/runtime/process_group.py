"""The processes that share a run, on torch.distributed. One process is a group of one: the code is
the same.

Ranks meet in collectives, all in the same order. A rank that fails does not come to the next
collective; it says why, and whoever waits for it is ended (`watchdog`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from attrs import frozen
from torch import Tensor

from bitpress.errors import BitpressError, first_line, is_out_of_memory

Item = TypeVar("Item")

RESUME_HINT = "the same command resumes from what is finished"


class RankError(BitpressError):
    """Another rank of the run has ended."""


class AgreedOutOfMemoryError(torch.OutOfMemoryError):
    """A rank has run out of memory, and all of them know: they can begin again together."""


@frozen
class ProcessGroup:
    """The processes of a run as one of them sees them; sizes and numbers are torchrun's.

    Attributes:
        rank: number of this process.
        world_size: number of all processes.
        local_world_size: number of processes on this machine, this one included.
        local_rank: number of this process among them.
    """

    rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    local_rank: int = 0

    @property
    def is_rank_zero(self) -> bool:
        """Whether this process prepares the output, writes calibrated blocks and talks to the
        user.
        """
        return self.rank == 0

    def local_device(self, name: str) -> str:
        """The device of this rank, where one was named for all: each its own GPU."""
        return f"cuda:{self.local_rank}" if name == "cuda" and self.world_size > 1 else name

    def partition_by_size(
        self, items: Sequence[Item], size_of: Callable[[Item], int]
    ) -> list[Item]:
        """The part of the items that is this rank's, in their order.

        The largest are assigned first, each to the rank that has the least by then.
        """
        rank_sizes = [0] * self.world_size
        positions = []
        for i in sorted(range(len(items)), key=lambda i: -size_of(items[i])):
            rank = rank_sizes.index(min(rank_sizes))
            rank_sizes[rank] += size_of(items[i])
            if rank == self.rank:
                positions.append(i)
        return [items[i] for i in sorted(positions)]

    def partition_evenly(self, items: Sequence[Item]) -> range:
        """Positions of this rank's part of the items, where neighbors stay together.

        The parts of two ranks differ by one item at most.
        """
        num_items = len(items)
        return range(
            self.rank * num_items // self.world_size, (self.rank + 1) * num_items // self.world_size
        )

    @contextlib.contextmanager
    def agreeing(self) -> Iterator[None]:
        """Work of each rank without a collective in it, after which all go on, or none.

        Raises:
            AgreedOutOfMemoryError: on all ranks, where a device of one had not enough memory.
        """
        shortage = ""
        try:
            yield
        except RuntimeError as e:
            if not is_out_of_memory(e):
                raise
            shortage = first_line(e)
        # outside the handler: the error holds what the work has held
        shortages = self.all_gather_object(shortage)
        for rank, text in enumerate(shortages):
            if text:
                raise AgreedOutOfMemoryError(f"rank {rank}: {text}")

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        # not dist.barrier: where there are GPUs it runs on NCCL, which would guess this process's
        self.all_gather_object(None)

    def all_gather_object(self, value: Item) -> list[Item]:
        """Every rank's value, no tensor, in the order of ranks."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        with _collective():
            dist.all_gather_object(values, value)
        return values

    def broadcast_object(self, value: Item, source: int = 0) -> Item:
        """The value that the rank `source` has; no tensor, which would come on that rank's GPU."""
        if self.world_size == 1:
            return value
        values = [value]
        with _collective():
            dist.broadcast_object_list(values, source)
        return values[0]

    def broadcast(self, tensor: Tensor, source: int) -> Tensor:
        """The tensor that the rank `source` has; all others give one of its dtype and shape, which
        may be overwritten.
        """
        if self.world_size == 1:
            return tensor
        tensor = tensor.contiguous()
        with _collective():
            # as bytes: not every backend knows every dtype
            dist.broadcast(tensor.reshape(-1).view(torch.uint8), source)
        return tensor

    def broadcast_from_last(self, tensor: Tensor | None, device: torch.device) -> Tensor | None:
        """The tensor of the last rank that has one; None where none has."""
        specs = self.all_gather_object(None if tensor is None else (tensor.shape, tensor.dtype))
        for rank, spec in reversed(list(enumerate(specs))):
            if spec is None:
                continue
            shape, dtype = spec
            with self.agreeing():
                if rank != self.rank:
                    tensor = torch.empty(shape, dtype=dtype, device=device)
            assert tensor is not None
            return self.broadcast(tensor, rank)
        return None

    def reduce(self, tensor: Tensor, destination: int, operation: Literal["sum", "max"]) -> None:
        """Add up the tensors of all ranks, or take the maximum of each element, in the one that the
        rank `destination` has.
        """
        with _collective():
            reduce_op = dist.ReduceOp.SUM if operation == "sum" else dist.ReduceOp.MAX
            dist.reduce(tensor, destination, reduce_op)


SINGLE_PROCESS = ProcessGroup()


@contextlib.contextmanager
def _collective() -> Iterator[None]:
    """A collective whose failure means that another rank does not take part any more."""
    try:
        yield
    except RuntimeError as e:
        if is_out_of_memory(e):
            raise
        # gloo's messages begin with their source line in brackets
        reason = str(e).splitlines()[0].rpartition("] ")[2]
        raise RankError(
            f"another rank of the run has ended ({reason}): it, or torchrun, says which and why; "
            f"{RESUME_HINT}"
        ) from None
