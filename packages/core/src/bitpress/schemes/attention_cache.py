"""What a scheme makes of an attention's cache: the keys and values that an engine keeps of the
tokens that it has seen.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from bitpress.schemes import hook_results
from bitpress.schemes.registry import Step
from bitpress.schemes.values import Statistic, StoredLayer

# What an attention function is given, in the order of its arguments.
STATES = ("query", "key", "value")

# Of each of STATES, what a scheme has observed.
StateStatistics = Mapping[str, Mapping[str, Statistic]]

# Queries (sequences, query heads, tokens, channels), keys and values (sequences, heads, tokens,
# channels) of an attention -> the keys and values that an engine computes with.
CacheQuantizer = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@frozen
class CacheShape:
    """Heads of an attention.

    Attributes:
        num_query_heads: of queries.
        num_heads: of keys and of values.
        channels: of a head.
    """

    num_query_heads: int
    num_heads: int
    channels: int


def observe(step: Step, states: Tensor) -> Mapping[str, Statistic]:
    """What a step observes of some queries, keys or values.

    Args:
        states: (sequences, heads, tokens, channels).
    """
    tokens = states.transpose(1, 2).flatten(0, 1)
    result = step.call("observe_cache", states=tokens)
    return hook_results.check_statistics(step, result, len(tokens)) or {}


def serialize(step: Step, stats: StateStatistics, dtype: torch.dtype) -> StoredLayer:
    """What a step stores of an attention's cache."""
    return hook_results.check_stored_layer(
        step, step.call("serialize_cache", stats=stats, dtype=dtype)
    )


@functools.lru_cache(maxsize=4096)
def describe(shape: CacheShape, dtype: torch.dtype, step: Step) -> StoredLayer:
    """What is stored of a cache of this shape: right dtypes and shapes, and meaningless numbers."""
    states = {
        name: torch.zeros(
            1, shape.num_query_heads if name == "query" else shape.num_heads, 1, shape.channels
        )
        for name in STATES
    }
    return serialize(step, {name: observe(step, x) for name, x in states.items()}, dtype)


def cache_quantizer(
    step: Step, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None
) -> CacheQuantizer:
    """How keys and values are rounded while serving.

    Args:
        tensors: what is stored of the cache.
        config: the `kv_cache_scheme`.
    """

    def quantize(name: str, states: Tensor) -> Tensor:
        tokens = states.transpose(1, 2).flatten(0, 1)  # (tokens, heads, channels)
        on_device = {suffix: tensor.to(states.device) for suffix, tensor in tensors.items()}
        rounded = step.scheme.call(
            "quantize_cache", states=tokens.float(), name=name, tensors=on_device, config=config
        )
        hook_results.check_tensor(step.scheme, "quantize_cache", rounded, tuple(tokens.shape))
        by_sequence = rounded.view(states.shape[0], states.shape[2], *tokens.shape[1:])
        restored: Tensor = by_sequence.transpose(1, 2).to(states.dtype)
        return restored

    return lambda query, key, value: (quantize("key", key), quantize("value", value))
