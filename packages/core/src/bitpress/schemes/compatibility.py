"""Whether a plugin fits this core: what its package requires, and which hooks and arguments it asks
for.
"""

from __future__ import annotations

import inspect
from importlib import metadata
from typing import Any

import pluggy
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from bitpress.errors import nearest
from bitpress.schemes import hookspecs

CORE = "bitpress-core"


def version_fault(package: str) -> str | None:
    """What to upgrade where an installed package asks for another core than this one; None where it
    does not.
    """
    here = metadata.version(CORE)
    for text in metadata.requires(package) or ():
        wanted = Requirement(text)
        applies = wanted.marker is None or wanted.marker.evaluate({"extra": ""})
        if (
            canonicalize_name(wanted.name) != CORE
            or not applies
            or wanted.specifier.contains(here, prereleases=True)
        ):
            continue
        lowest = [
            part.version.removesuffix(".*")
            for part in wanted.specifier
            if part.operator not in ("<", "<=", "!=")
        ]
        later = any(Version(version) > Version(here) for version in lowest)
        return (
            f"it needs {CORE} {wanted.specifier} and this is {here}: pip install --upgrade "
            f"{CORE if later else package}"
        )
    return None


def hook_fault(manager: pluggy.PluginManager, plugin: Any) -> str | None:
    """What a plugin asks for that this core's hooks do not give, and what to do; None where they
    give it all.

    A hook marked `optionalhook=True` may be one that the core does not know.
    """
    upgrade = f"(pip install --upgrade {CORE} if it is new)"
    here = f"{CORE} {metadata.version(CORE)} (hooks {hookspecs.VERSION})"
    hooks = [name for name in vars(manager.hook) if not name.startswith("_")]
    for name in dir(plugin):
        marks = manager.parse_hookimpl_opts(plugin, name)
        if marks is None:
            continue
        hook = marks["specname"] or name
        if hook not in hooks:
            if marks["optionalhook"]:
                continue
            return (
                f"unknown hook {hook!r}, which {here} does not have{nearest(hook, hooks)} {upgrade}"
            )
        given = getattr(hookspecs, hook).__annotations__.keys() - {"return"}
        for argument in inspect.signature(getattr(plugin, name)).parameters:
            if argument not in given:
                return (
                    f"{hook} asks for {argument!r}, which {here} does not give"
                    f"{nearest(argument, given)} {upgrade}"
                )
    return None
