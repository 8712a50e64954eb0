"""Stand-ins for libraries of images, which model classes import, and whose layers nobody
quantizes: torchvision has no build for a CPU that vLLM's would go with.
"""

from __future__ import annotations

import importlib.machinery
import sys
import types

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


def _attribute(name: str) -> type:
    if name.startswith("__"):
        raise AttributeError(name)
    return _AnyValue(name, (), {"__init__": lambda self, *args, **kwargs: None})
