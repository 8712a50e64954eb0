"""Attention functions of transformers, watched: what a module gives them can be seen, and replaced.

Models call them through one interface (`transformers.AttentionInterface`), whatever they name their
layers: with queries and keys after the rotation, and with values.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

# What watches a module's attention, as an attribute of the module.
_WATCHER = "_bitpress_watcher"

# transformers' name of what models compute with where no faster function is chosen: each has one
# of its own, in its module of Python.
_EAGER, _EAGER_FUNCTION = "eager", "eager_attention_forward"

# Queries, keys and values, each (sequences, heads, tokens, channels) -> the keys and values to
# compute with.
Watcher = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def watch(module: nn.Module, watcher: Watcher | None) -> None:
    """Let a watcher see what an attention module computes with, or none any longer.

    It is called inside `watched_attention` only.
    """
    setattr(module, _WATCHER, watcher)


@contextlib.contextmanager
def watched_attention() -> Iterator[None]:
    """While it lasts, watchers of modules are called."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    functions: dict[str, Callable[..., Any] | None] = dict(ALL_ATTENTION_FUNCTIONS)
    functions.setdefault(_EAGER, None)
    for name, function in functions.items():
        ALL_ATTENTION_FUNCTIONS[name] = _watched(function)
    try:
        yield
    finally:
        for name, function in functions.items():
            del ALL_ATTENTION_FUNCTIONS[name]
            # one that somebody else had put there for this process
            if function is not None and ALL_ATTENTION_FUNCTIONS.get(name) is not function:
                ALL_ATTENTION_FUNCTIONS[name] = function


def _watched(function: Callable[..., Any] | None) -> Callable[..., Any]:
    """An attention function before which a module's watcher is called.

    Args:
        function: None for the one that each model has of its own.
    """

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        watcher: Watcher | None = getattr(module, _WATCHER, None)
        if watcher is not None:
            key, value = watcher(query, key, value)
        compute = function
        if compute is None:
            compute = getattr(sys.modules[type(module).__module__], _EAGER_FUNCTION)
        return compute(module, query, key, value, *args, **kwargs)

    return attend
