"""What a loader makes of a layer's inputs before it computes with them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from bitpress.errors import SchemeError
from bitpress.schemes import hook_results
from bitpress.schemes.registry import Scheme, Step

# what the names of stored tensors begin with that tell of activations
INPUTS = "input_"

Rounding = Callable[[Tensor], Tensor]


def known(config: Mapping[str, Any] | None, steps: Sequence[Step]) -> bool:
    """Whether a layer's inputs are rounded while serving; raises SchemeError where they are, and no
    step says how.
    """
    found = bool(config and config.get("input_activations"))
    if found and not any(step.scheme.has("quantize_activations") for step in steps):
        raise SchemeError(
            f"{steps[-1].scheme}: it has no `quantize_activations` hook, without which its result "
            "cannot be run"
        )
    return found


def input_rounding(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None, steps: Sequence[Step]
) -> Rounding | None:
    """(tokens, in) -> (tokens, in) float32, by the scheme that wrote a layer; None where it rounds
    nothing, or does not say how.

    Args:
        tensors: what is stored of the layer.
        config: its config fragment.
    """
    scheme = next(
        (step.scheme for step in reversed(steps) if step.scheme.has("quantize_activations")), None
    )
    if scheme is None or not (config and config.get("input_activations")):
        return None
    own = {name: tensor for name, tensor in tensors.items() if name.startswith(INPUTS)}
    return functools.partial(_rounded, scheme, own, config)


def _rounded(
    scheme: Scheme, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None, inputs: Tensor
) -> Tensor:
    # an expert that is sent no token
    if not len(inputs):
        return inputs
    found = scheme.call(
        "quantize_activations", inputs=inputs.float(), tensors=tensors, config=config
    )
    return hook_results.restored(scheme, "quantize_activations", found, inputs.shape)
