"""A model run block by block on batches of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from attrs import field, frozen
from torch import Tensor, nn

from bitpress.checkpoint.reader import Checkpoint, Reader
from bitpress.modeling.capture import Call, record
from bitpress.modeling.decoder import Decoder
from bitpress.modeling.hidden_states import States
from bitpress.planning import memory_estimate
from bitpress.runtime.progress import Told
from bitpress.schemes.activation_quantizer import Rounding


class _Run:
    """A model on its way through its blocks."""

    def __init__(
        self,
        subject: Subject,
        batches: Sequence[Tensor],
        device: torch.device,
        place: Path | None,
        trust: bool,
    ) -> None:
        self.decoder = Decoder(
            subject.checkpoint, subject.container, subject.reader, device, torch.float32, trust
        )
        self.beside: tuple[Any, ...] | None = None
        self._subject, self.device = subject, device
        recording = record(self.decoder, batches, device, torch.float32, place)
        self.states, self._calls = recording.hidden, recording.calls

    def advance(self, index: int, told: Told) -> None:
        """Go through one block."""
        prefix = f"{self._subject.container}.{index}."
        block = self.decoder.block(index)
        for name, rounding in self._subject.rounding.items():
            if name.startswith(prefix):
                block.get_submodule(name.removeprefix(prefix)).register_forward_pre_hook(
                    _rounded(rounding)
                )
        calls, self._calls[index] = self._calls[index], []
        for i, call in enumerate(calls):
            found = call.whole(block, self.states[i].to(self.device))
            self.beside = tuple(found[1:]) if isinstance(found, tuple) else None
            self.states[i] = found[0] if isinstance(found, tuple) else found
        told(
            memory_estimate.NUMBER_BYTES
            * sum(parameter.numel() for parameter in block.parameters()),
            prefix.removesuffix("."),
        )


def _rounded(
    rounding: Callable[[Tensor], Tensor],
) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """A hook that rounds a layer's inputs."""

    def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        inputs = arguments[0]
        return (
            rounding(inputs.flatten(0, -2).float()).view(inputs.shape).to(inputs.dtype),
            *arguments[1:],
        )

    return hook


@frozen(eq=False)
class Subject:
    """A model that can be run.

    Attributes:
        checkpoint: its tensors as they are computed with.
        reader: reads them.
        container: the name of the list of decoder blocks.
        rounding: by layer, what is made of its inputs (tokens, in) before it computes with them.
    """

    checkpoint: Checkpoint
    reader: Reader
    container: str
    rounding: Mapping[str, Rounding] = field(factory=dict)


def plain(checkpoint: Checkpoint, reader: Reader, container: str) -> Subject:
    """A model whose tensors are computed with as they are stored."""
    return Subject(checkpoint, reader, container)


class _Way:
    """The judged batches on their way through the blocks.

    Args:
        states: of many ways; `places` are this one's.
    """

    def __init__(self, states: States, places: Sequence[int]) -> None:
        self._states, self._places = states, places
        # what the last block returned with its output
        self.beside: tuple[Any, ...] | None = None

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, batch: int) -> Tensor:
        return self._states[self._places[batch]].flatten(0, -2)

    def go(self, block: nn.Module, calls: Sequence[Call], device: torch.device) -> None:
        """On through one block."""
        for place, output in zip(self._places, self._outputs(block, calls, device), strict=True):
            self._states[place] = output

    def branch(self, block: nn.Module, calls: Sequence[Call], device: torch.device) -> _Way:
        """Another way, that goes through another block here."""
        first = len(self._states)
        for output in self._outputs(block, calls, device):
            self._states.append(output.cpu())
        return _Way(self._states, range(first, len(self._states)))

    def _outputs(
        self, block: nn.Module, calls: Sequence[Call], device: torch.device
    ) -> Iterator[Tensor]:
        for place, call in zip(self._places, calls, strict=True):
            found = call.whole(block, self._states[place].to(device))
            self.beside = tuple(found[1:]) if isinstance(found, tuple) else None
            yield found[0] if isinstance(found, tuple) else found
