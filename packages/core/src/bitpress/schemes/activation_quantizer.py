"""What a loader makes of a layer's inputs before it computes with them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from bitpress.errors import SchemeError
from bitpress.schemes import hook_results
from bitpress.schemes.registry import Scheme, Step

# With it begin the names of stored tensors that describe activations: `input_scale`, ...
INPUT_PREFIX = "input_"

# Inputs (tokens, in) -> the float32 numbers (tokens, in) that an engine computes with.
ActivationQuantizer = Callable[[Tensor], Tensor]


def quantizes_activations(config: Mapping[str, Any] | None, steps: Sequence[Step]) -> bool:
    """Whether a layer's inputs are quantized while serving.

    Raises:
        SchemeError: they are, and no step has the hook that says how.
    """
    if not (config and config.get("input_activations")):
        return False
    if not any(step.scheme.has("quantize_activations") for step in steps):
        raise SchemeError(
            f"{steps[-1].scheme}: it has no `quantize_activations` hook, without which its result "
            "cannot be run"
        )
    return True


def find_activation_quantizer(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None, steps: Sequence[Step]
) -> ActivationQuantizer | None:
    """How a layer's inputs are quantized while serving, by the scheme that wrote the layer.

    Args:
        tensors: what is stored of the layer.
        config: its config fragment.
        steps: of the layer.

    Returns:
        (tokens, in) -> (tokens, in) float32; None where inputs are not quantized, or no scheme has
        the hook that says how.
    """
    if not (config and config.get("input_activations")):
        return None
    for step in reversed(steps):
        if step.scheme.has("quantize_activations"):
            of_inputs = {name: t for name, t in tensors.items() if name.startswith(INPUT_PREFIX)}
            return functools.partial(_quantize_activations, step.scheme, of_inputs, config)
    return None


def quantize_arguments(
    quantizer: ActivationQuantizer, arguments: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """A layer's arguments, of which the first, its inputs (..., in), are quantized."""
    inputs, *others = arguments
    quantized = quantizer(inputs.flatten(0, -2))  # (tokens, in)
    return (quantized.view_as(inputs).to(inputs.dtype), *others)


def _quantize_activations(
    scheme: Scheme, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None, inputs: Tensor
) -> Tensor:
    # An expert may be sent no token, and a scheme need not know what the largest of none is.
    if not len(inputs):
        return inputs
    rounded = scheme.call(
        "quantize_activations", inputs=inputs.float(), tensors=tensors, config=config
    )
    return hook_results.check_tensor(scheme, "quantize_activations", rounded, inputs.shape)
