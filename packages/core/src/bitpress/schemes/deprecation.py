"""Public names of release 0.1, which work in this release still and warn."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import pluggy

Function = TypeVar("Function", bound=Callable[..., Any])

# Hooks of release 0.1, and what they are called now.
OLD_HOOKS: Mapping[str, str] = {
    "restore": "dequantize",
    "quantize_inputs": "quantize_activations",
    "check": "validate_weight",
    "bound": "error_bound",
}


def warn_renamed(old: str, new: str) -> None:
    """Warn the caller's caller that a name is another one now."""
    warnings.warn(
        f"{old} is now {new}; the old name goes with the next release",
        DeprecationWarning,
        stacklevel=3,
    )


def rename_keywords(new_names: Mapping[str, str]) -> Callable[[Function], Function]:
    """A decorator that lets a function take keywords under their old names too."""

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            for old in [name for name in kwargs if name in new_names]:
                name = f"bitpress.{function.__name__}"
                warn_renamed(f"{name}({old}=...)", f"{name}({new_names[old]}=...)")
                kwargs[new_names[old]] = kwargs.pop(old)
            return function(*args, **kwargs)

        return cast(Function, call)

    return decorate


def accept_old_names(cls: Any, new_names: Mapping[str, str]) -> None:
    """Let a class take keywords, and have attributes, under their old names too."""
    init = cls.__init__

    @functools.wraps(init)
    def init_with_old_names(self: Any, *args: Any, **kwargs: Any) -> None:
        for old in [name for name in kwargs if name in new_names]:
            warn_renamed(f"{cls.__name__}({old}=...)", f"{cls.__name__}({new_names[old]}=...)")
            # attrs.evolve passes the new name too, with the value from before: the old one wins.
            kwargs[new_names[old]] = kwargs.pop(old)
        init(self, *args, **kwargs)

    cls.__init__ = init_with_old_names
    for old, new in new_names.items():
        setattr(cls, old, _renamed_attribute(cls.__name__, old, new))


def _renamed_attribute(owner: str, old: str, new: str) -> property:
    def get_by_new_name(instance: Any) -> Any:
        warn_renamed(f"{owner}.{old}", f"{owner}.{new}")
        return getattr(instance, new)

    return property(get_by_new_name)


class PluginManager(pluggy.PluginManager):
    """A plugin manager that also takes hooks under the names that they had in release 0.1."""

    def parse_hookimpl_opts(self, plugin: Any, name: str) -> pluggy.HookimplOpts | None:
        hookimpl_opts = super().parse_hookimpl_opts(plugin, name)
        if hookimpl_opts is not None:
            hook = hookimpl_opts["specname"] or name
            if hook in OLD_HOOKS:
                warn_renamed(f"the hook `{hook}`", f"`{OLD_HOOKS[hook]}`")
                hookimpl_opts["specname"] = OLD_HOOKS[hook]
        return hookimpl_opts
