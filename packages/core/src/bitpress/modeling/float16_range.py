"""Whether a model would leave the range of float16, which ends far below that of bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# The largest number that float16 holds; what is larger becomes infinity, and NaN soon after.
FLOAT16_MAX = torch.finfo(torch.float16).max


class Float16Watch:
    """The largest number that comes up in the blocks of a model.

    What is watched are weights, inputs and outputs of linear layers, and outputs of blocks.
    Attention is not: kernels sum it up in float32.

    Attributes:
        largest: the magnitude.
        location: where it came up: "the output of model.layers.3.mlp.down_proj".
    """

    def __init__(self) -> None:
        self.largest = 0.0
        self.location = ""

    def watch(self, block: nn.Module, name: str) -> None:
        """Watch a block by this name from now on, and look at its weights."""
        for parameter_name, parameter in block.named_parameters():
            self._look_at(parameter, f"{name}.{parameter_name}")
        block.register_forward_hook(self._hook(f"the output of {name}", of_output=True))
        for module_name, module in block.named_modules():
            if isinstance(module, nn.Linear):
                layer = f"{name}.{module_name}"
                module.register_forward_hook(self._hook(f"the input of {layer}", of_output=False))
                module.register_forward_hook(self._hook(f"the output of {layer}", of_output=True))

    def describe(self) -> str | None:
        """One line that warns of float16; None where all numbers fit."""
        if self.largest <= FLOAT16_MAX:
            return None
        return (
            f"float16 ends at {FLOAT16_MAX:,.0f}, and {self.location} reaches {self.largest:,.0f}: "
            "serve the model in bfloat16 (vLLM: --dtype bfloat16)"
        )

    def _hook(self, location: str, of_output: bool) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            values = output if of_output else arguments
            self._look_at(values[0] if isinstance(values, tuple) else values, location)

        return hook

    def _look_at(self, tensor: Tensor, location: str) -> None:
        if not tensor.numel():
            return
        smallest, largest = tensor.aminmax()
        magnitude = max(-float(smallest), float(largest))
        if magnitude > self.largest:
            self.largest, self.location = magnitude, location
