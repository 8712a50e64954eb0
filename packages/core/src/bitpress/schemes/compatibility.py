"""Whether a plugin fits this core: the core that its package requires, and the hooks and arguments
that it asks for.
"""

from __future__ import annotations

import inspect
from importlib import metadata
from typing import Any

import pluggy
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from bitpress.errors import did_you_mean
from bitpress.schemes import hookspecs

CORE = "bitpress-core"


def version_fault(package: str) -> str | None:
    """What to upgrade where an installed package requires another core than this one; None where
    it does not.
    """
    core_version = metadata.version(CORE)
    for text in metadata.requires(package) or ():
        requirement = Requirement(text)
        if canonicalize_name(requirement.name) != CORE:
            continue
        # A marker may ask for another Python, or for an extra, and none is asked for here.
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        if requirement.specifier.contains(core_version, prereleases=True):
            continue

        lower_bounds = [
            specifier.version.removesuffix(".*")
            for specifier in requirement.specifier
            if specifier.operator not in ("<", "<=", "!=")
        ]
        needs_later_core = any(Version(bound) > Version(core_version) for bound in lower_bounds)
        return (
            f"it needs {CORE} {requirement.specifier} and this is {core_version}: pip install "
            f"--upgrade {CORE if needs_later_core else package}"
        )
    return None


def hook_fault(manager: pluggy.PluginManager, plugin: Any) -> str | None:
    """The first hook or argument of a plugin that this core does not have, and what to do; None
    where it has all of them.

    A hook marked `optionalhook=True` may be one that the core does not know.
    """
    advice = f"(pip install --upgrade {CORE} if it is new)"
    core = f"{CORE} {metadata.version(CORE)} (hooks {hookspecs.VERSION})"
    hooks = hook_names(manager)
    for name in dir(plugin):
        hookimpl_opts = manager.parse_hookimpl_opts(plugin, name)
        if hookimpl_opts is None:
            continue
        hook = hookimpl_opts["specname"] or name
        if hook not in hooks:
            if hookimpl_opts["optionalhook"]:
                continue
            hint = did_you_mean(hook, hooks)
            return f"unknown hook {hook!r}, which {core} does not have{hint} {advice}"

        spec_arguments = getattr(hookspecs, hook).__annotations__.keys() - {"return"}
        for argument in inspect.signature(getattr(plugin, name)).parameters:
            if argument not in spec_arguments:
                hint = did_you_mean(argument, spec_arguments)
                return f"{hook} asks for {argument!r}, which {core} does not give{hint} {advice}"
    return None


def hook_names(manager: pluggy.PluginManager) -> list[str]:
    """The hooks that a manager has specifications of."""
    return [name for name in vars(manager.hook) if not name.startswith("_")]
