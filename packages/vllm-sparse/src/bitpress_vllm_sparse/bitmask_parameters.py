"""Layers stored without their zeros, as vLLM's loader hands them over: a tensor at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from bitpress_sparse import bitmask

# What is stored in place of a layer's numbers.
SUFFIXES = (bitmask.VALUES, bitmask.MASK, bitmask.SHAPE)

# Rows keep as many numbers each, and need no offsets.
UNUSED = (bitmask.ROW_OFFSETS,)


class BitmaskParameters:
    """Parameters of a layer that take what is stored of it, and hand its numbers, zeros included,
    to the loader of the parameter that holds them.

    vLLM fuses layers: tensors of one come with its place in the whole, and its numbers are handed
    on with that, for the loader to cut for this rank.
    """

    def __init__(self, layer: Any, prefix: str = "") -> None:
        """Register the parameters.

        Args:
            layer: whose parameter for numbers is there.
            prefix: of the names of its parameters: "w13_" and "w2_" of experts.
        """
        self._layer, self._prefix = layer, prefix
        words = f"{prefix}{bitmask.WORDS}"
        self._name = words if hasattr(layer, words) else f"{prefix}{bitmask.NUMBERS}"
        # what has come of each part of the layer
        self._parts: dict[Hashable, dict[str, Tensor]] = defaultdict(dict)
        for suffix in (*SUFFIXES, *UNUSED):
            parameter: Any = Parameter(torch.empty(0, dtype=torch.uint8), requires_grad=False)
            parameter.weight_loader = partial(self._load, suffix)
            layer.register_parameter(f"{prefix}{suffix}", parameter)

    def _load(
        self, suffix: str, param: Any, loaded_weight: Tensor, *place: Any, **named: Any
    ) -> Any:
        """Take one tensor; with the last of a part, load its numbers."""
        if suffix in UNUSED:
            return True
        # Experts' loaders are given the name of the tensor too.
        ending = f"{self._prefix}{suffix}"
        place = tuple(_rename(x, ending, self._name) for x in place)
        named = {key: _rename(x, ending, self._name) for key, x in named.items()}
        key = (place, tuple(named.items()))
        numbers: Any = getattr(self._layer, self._name)
        self._parts[key][suffix] = loaded_weight.to(numbers.device)
        if self._parts[key].keys() < set(SUFFIXES):
            return True
        load: Callable[..., Any] = numbers.weight_loader
        return load(numbers, _expand(self._parts.pop(key), numbers), *place, **named)

    def finish(self) -> None:
        """Remove the parameters.

        Raises:
            ValueError: a part of the layer lacks a tensor.
        """
        for tensors in self._parts.values():
            missing = sorted(set(SUFFIXES) - tensors.keys())
            name = getattr(self._layer, "prefix", None) or type(self._layer).__name__
            raise ValueError(
                f"{name}: {', '.join(missing)} is missing beside {', '.join(sorted(tensors))}; "
                "fetch the checkpoint again"
            )
        for suffix in (*SUFFIXES, *UNUSED):
            delattr(self._layer, f"{self._prefix}{suffix}")


def _expand(tensors: dict[str, Tensor], parameter: Parameter) -> Tensor:
    """(out, in) numbers, or (out, words) codes, of which the parameter holds some."""
    bits = 32 // getattr(parameter, "packed_factor", 1)
    config = {"weights": {"num_bits": int(bits)}}
    (numbers,) = bitmask.expand(tensors, config).values()
    return numbers


def _rename(argument: Any, ending: str, name: str) -> Any:
    """A loader's argument, with a tensor's name changed to that of the parameter for numbers."""
    if isinstance(argument, str) and argument.endswith(ending):
        return argument.removesuffix(ending) + name
    return argument
