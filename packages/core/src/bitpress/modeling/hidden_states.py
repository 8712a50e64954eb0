"""The hidden states between two blocks, one tensor for each batch: on the device that computes, in
the host's memory or on disk.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from bitpress.runtime.devices import CPU, CopyStream


class HiddenStates:
    """The hidden states of batches; each can be read, and replaced by one of the same shape, by any
    thread.

    Args:
        tensors: one for each batch, (sequences, length, channels).
        folder: where they are kept in a file without a name, which vanishes with the process; None
            keeps them in memory.
        device: in whose memory, where there is no folder.
    """

    def __init__(
        self,
        tensors: Iterable[Tensor] = (),
        folder: Path | None = None,
        device: torch.device = CPU,
    ) -> None:
        # where they are in a file, tensors without numbers say their shapes and dtypes
        self._folder, self._device = folder, device
        self._tensors: list[Tensor] = []
        self._offsets = [0]
        self._file = None
        # a file has one position for all threads
        self._lock = threading.Lock()
        self._copy_stream: CopyStream | None = None
        # by its number, the batch's that are on their way to a GPU
        self._ahead: dict[int, Tensor] = {}
        if folder is not None:
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed with the object)
        for tensor in tensors:
            self.append(tensor)

    def kept_alike(self, tensors: Iterable[Tensor] = ()) -> HiddenStates:
        """Others, kept where these are."""
        return HiddenStates(tensors, self._folder, self._device)

    def append(self, tensor: Tensor) -> None:
        """Take one more batch's."""
        self._tensors.append(tensor if self._file is None else tensor.to("meta"))
        self._offsets.append(self._offsets[-1] + tensor.numel() * tensor.element_size())
        self[len(self) - 1] = tensor

    def __len__(self) -> int:
        return len(self._tensors)

    def __getitem__(self, index: int) -> Tensor:
        return self._load(index)

    def bring(self, index: int, device: torch.device, following: int | None = None) -> Tensor:
        """Those of a batch on the device that computes, not to be changed.

        Where they are brought to a GPU, one thread asks for them.

        Args:
            following: the batch that is asked for next, if there is one of that number: it is
                copied while this one is computed with.
        """
        if device.type == "cpu" or self._device.type != "cpu":
            return self[index].to(device)
        if self._copy_stream is None:
            self._copy_stream = CopyStream(device)
        if index not in self._ahead:
            self._copy_ahead(index)
        brought = self._copy_stream.receive(self._ahead.pop(index))
        self._ahead.clear()
        if following is not None and following < len(self):
            self._copy_ahead(following)
        return brought

    def _copy_ahead(self, index: int) -> None:
        assert self._copy_stream is not None
        self._ahead[index] = self._copy_stream.begin(self._load(index, is_pinned=True))

    def _load(self, index: int, is_pinned: bool = False) -> Tensor:
        """A batch's where they are kept, those of a file in new memory."""
        tensor = self._tensors[index]
        if self._file is None:
            return tensor
        loaded = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=is_pinned)
        content = memoryview(loaded.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        with self._lock:
            self._file.seek(self._offsets[index])
            self._file.readinto(content)
        return loaded

    def __setitem__(self, index: int, tensor: Tensor) -> None:
        self._ahead.pop(index, None)
        if self._file is None:
            self._tensors[index] = self._keep(tensor)
            return
        content = tensor.cpu().contiguous().reshape(-1).view(torch.uint8)
        with self._lock:
            self._file.seek(self._offsets[index])
            self._file.write(memoryview(content.numpy()))  # type: ignore[arg-type]

    def _keep(self, tensor: Tensor) -> Tensor:
        if self._device.type != "cpu" or tensor.device.type == "cpu":
            return tensor.to(self._device)
        # a GPU copies to and from pinned memory without a detour
        pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return pinned.copy_(tensor)
