"""Linear layers whose weights stay in the host's memory, for blocks that do not fit a GPU: the GPU
has a copy of each while it computes with it, and keeps the last ones.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from attrs import frozen
from torch import Tensor, nn
from torch.nn import functional


@frozen(eq=False)
class _Copy:
    """A weight on the device, as it was at a version of the one in the host's memory."""

    weight: Tensor
    version: int
    on_device: Tensor

    def is_of(self, weight: Tensor) -> bool:
        """Whether it has a weight's present numbers."""
        return self.weight is weight and self.version == weight._version


class BroughtWeights:
    """What a device has of weights that lie in the host's memory: those that were asked for last.

    Batches come to a layer one after the other: its weight is brought for the first of them.

    Args:
        max_bytes: of all copies; one is there however large it is.
    """

    def __init__(self, device: torch.device, max_bytes: int) -> None:
        self._device, self._max_bytes = device, max_bytes
        self._copies: list[_Copy] = []

    def take(self, block: nn.Module) -> None:
        """Let the linear layers of a block, without weights as yet, compute with copies; those of
        blocks before it are dropped.
        """
        self._copies.clear()
        for module in block.modules():
            # others compute in ways of their own
            if type(module) is nn.Linear:
                module.__class__ = HostLinear
                cast(HostLinear, module).brought_weights = self

    def bring(self, weight: Tensor) -> Tensor:
        """A copy of a weight on the device, which is not to be changed."""
        current = [copy for copy in self._copies if copy.is_of(weight)]
        self._copies = [copy for copy in self._copies if copy.weight is not weight]
        if current:
            self._copies += current
            return current[0].on_device
        while self._copies and self._num_bytes() + weight.nbytes > self._max_bytes:
            del self._copies[0]
        self._copies.append(_Copy(weight, weight._version, self.copy(weight)))
        return self._copies[-1].on_device

    def copy(self, weight: Tensor) -> Tensor:
        """A new copy; the host waits for it, for it may change the weight right afterwards."""
        return weight.to(self._device)

    def _num_bytes(self) -> int:
        return sum(copy.weight.nbytes for copy in self._copies)


class HostLinear(nn.Linear):
    """A linear layer whose weight, but not its bias, lies in the host's memory.

    Attributes:
        brought_weights: the device that computes has them from here.
    """

    brought_weights: BroughtWeights

    def forward(self, input: Tensor) -> Tensor:
        """(..., out) of (..., in), both on the device."""
        arguments = (input, self.weight, self.bias, self.brought_weights)
        return _Product.apply(*arguments)  # type: ignore[no-any-return, no-untyped-call]


class _Product(torch.autograd.Function):
    """x Wᵀ + b, whose graph holds the weight in the host's memory and not its copy."""

    @staticmethod
    def forward(
        context: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        brought_weights: BroughtWeights,
    ) -> Tensor:
        context.weight, context.brought_weights = weight, brought_weights
        return functional.linear(x, brought_weights.bring(weight), bias)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return gradient @ context.brought_weights.bring(context.weight), None, None, None


def lies_on_host(module: nn.Module, leaf: str) -> bool:
    """Whether a parameter of a module, by its name there, stays in the host's memory."""
    return isinstance(module, HostLinear) and leaf == "weight"


def computed_weight(module: nn.Module) -> Tensor:
    """A layer's weight where it is computed with, not to be changed there."""
    weight = module.get_parameter("weight")
    return module.brought_weights.bring(weight) if isinstance(module, HostLinear) else weight
