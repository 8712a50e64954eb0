"""Stand-ins for what vLLM's build for CPUs lacks, and that names and shapes of layers do not depend
on: libraries of images, and backends of attention.
"""

from __future__ import annotations

import importlib.machinery
import sys
import types
from typing import Any

MODULES = (
    "torchvision",
    "torchvision.io",
    "torchvision.models",
    "torchvision.ops",
    "torchvision.ops.boxes",
    "torchvision.transforms",
    "torchvision.transforms._functional_tensor",
    "torchvision.transforms.functional",
    "torchvision.transforms.v2",
    "torchvision.transforms.v2.functional",
)


class _AnyValue(type):
    """A class every attribute of which is some hashable value."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return f"{cls.__name__}.{name}"


def install_stubs() -> None:
    """Let the modules be imported, with any name in them a class."""
    for name in MODULES:
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__path__ = []
        vars(module).update(__version__="0.28.0", __getattr__=_attribute)
        sys.modules[name] = module
        parent, _, leaf = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], leaf, module)


def install_backend() -> None:
    """Let sparse attention, which has no backend for CPUs, take one that is never run."""
    from vllm.platforms import current_platform

    platform = type(current_platform)
    choose_backend = platform.get_attn_backend_cls.__func__

    def get_attn_backend_cls(cls: type, *args: Any, **kwargs: Any) -> str:
        try:
            return str(choose_backend(cls, *args, **kwargs))
        except NotImplementedError:
            return "vllm.v1.attention.backends.mla.flashmla_sparse.FlashMLASparseBackend"

    platform.get_attn_backend_cls = classmethod(get_attn_backend_cls)


def _attribute(name: str) -> type:
    if name.startswith("__"):
        raise AttributeError(name)
    return _AnyValue(name, (), {"__init__": lambda self, *args, **kwargs: None})
