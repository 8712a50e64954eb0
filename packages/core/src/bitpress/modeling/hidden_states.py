"""The hidden states between two blocks, one tensor per batch: in memory, or in a file without a
name where memory is short.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor


class States:
    """The hidden states of batches; each can be read, and replaced by one of the same shape.

    Args:
        folder: where the file is made, which vanishes with the process; None keeps them in memory.
    """

    def __init__(self, states: Iterable[Tensor] = (), folder: Path | None = None) -> None:
        self._states: list[Tensor] = []
        self._places = [0]
        self._file = None if folder is None else tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed with the object)
        for state in states:
            self.append(state)

    def append(self, state: Tensor) -> None:
        """Take one more batch's."""
        self._states.append(state if self._file is None else state.to("meta"))
        self._places.append(self._places[-1] + state.numel() * state.element_size())
        self[len(self) - 1] = state

    def __len__(self) -> int:
        return len(self._states)

    def __getitem__(self, index: int) -> Tensor:
        state = self._states[index]
        if self._file is None:
            return state
        found = torch.empty(state.shape, dtype=state.dtype)
        self._file.seek(self._places[index])
        self._file.readinto(memoryview(found.reshape(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
        return found

    def __setitem__(self, index: int, state: Tensor) -> None:
        if self._file is None:
            self._states[index] = state.cpu()
            return
        self._file.seek(self._places[index])
        self._file.write(memoryview(state.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
