"""Installed schemes, found by their entry points; one that is broken is reported and leaves the
others working.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import pluggy
from attrs import field, frozen

from bitpress.errors import BitpressError, RecipeError, SchemeError, memory_is_full, nearest
from bitpress.schemes import hookspecs
from bitpress.schemes.compatibility import hook_fault, version_fault
from bitpress.schemes.deprecation import PluginManager
from bitpress.schemes.options import Options, build

SCHEMES, EXTENSIONS = "bitpress.schemes", "bitpress.extensions"


@frozen(eq=False)
class Scheme:
    """One installed scheme.

    Attributes:
        package: the distribution that provides it.
        summary: the first line of the plugin's docstring.
        options_type: what users may set, a subclass of `bitpress.Options`.
    """

    name: str
    package: str
    version: str
    summary: str
    options_type: type[Options]
    _hooks: Mapping[str, pluggy.HookCaller] = field(repr=False)
    _arguments: Mapping[str, tuple[str, ...]] = field(repr=False)

    def has(self, hook: str) -> bool:
        """Whether the scheme implements the hook."""
        return hook in self._arguments

    def wants(self, hook: str, argument: str) -> bool:
        """Whether the scheme implements the hook and names the argument."""
        return argument in self._arguments.get(hook, ())

    def calibrated(self, options: Options) -> bool:
        """Whether the model must be run on data."""
        if options.calibrated is not None:
            return options.calibrated
        return self.wants("observe", "inputs")

    def step(self, values: Mapping[str, Any] | None = None) -> Step:
        """The scheme with options, ready to be applied; raises RecipeError for options it does not
        take.
        """
        return Step(self, build(self.options_type, values or {}, self.name))

    def call(self, hook: str, **arguments: Any) -> Any:
        """Call one hook of this scheme and of the extensions around it; None where the scheme
        leaves it out.

        Raises:
            SchemeError: the hook raised anything but a BitpressError; the message names scheme,
                package and version.
        """
        try:
            return self._hooks[hook](**arguments)
        except BitpressError:
            raise
        except (Exception, SystemExit) as e:
            text = str(e).splitlines()[0] if str(e) else "no message"
            # no fault of the scheme's
            if memory_is_full(e):
                raise
            raise SchemeError(f"{self} failed in {hook}: {type(e).__name__}: {text}") from e

    def __str__(self) -> str:
        return f"scheme {self.name} ({self.package} {self.version})"


@frozen(eq=False)
class Step:
    """A scheme and its options: one step of a recipe."""

    scheme: Scheme
    options: Options

    @property
    def calibrated(self) -> bool:
        """Whether the model must be run on data."""
        return self.scheme.calibrated(self.options)

    @property
    def rescales(self) -> bool:
        """Whether it may choose factors for the columns."""
        return self.scheme.has("rescale") and self.options.rescales is not False

    def call(self, hook: str, **arguments: Any) -> Any:
        """One hook, with this step's options."""
        return self.scheme.call(hook, **arguments, options=self.options)


@frozen
class Problem:
    """An entry point that could not be used, and why."""

    name: str
    package: str
    text: str


@frozen
class Registry:
    """What is installed: schemes by name, and what is broken."""

    schemes: Mapping[str, Scheme]
    problems: tuple[Problem, ...]

    def get(self, name: str) -> Scheme:
        """The scheme of that name.

        Raises:
            RecipeError: it is not installed, and the message names the nearest that is; or it is
                broken.
        """
        if name in self.schemes:
            return self.schemes[name]
        for problem in self.problems:
            if problem.name == name:
                raise RecipeError(
                    f"scheme {name} of {problem.package} cannot be used: {problem.text}"
                )
        hint, installed = nearest(name, self.schemes), ", ".join(self.schemes) or "none"
        raise RecipeError(
            f"scheme {name!r} is not installed{hint} (installed: {installed}); schemes are "
            "packages, bitpress-scheme-NAME: pip install the one that provides it"
        )


@functools.cache
def discover() -> Registry:
    """All installed schemes, with the installed extensions around them."""
    manager = PluginManager("bitpress")
    manager.add_hookspecs(hookspecs)
    problems: list[Problem] = []
    loaded: dict[str, metadata.EntryPoint] = {}
    installed = metadata.entry_points()
    for group in (EXTENSIONS, SCHEMES):
        named = defaultdict(list)
        for entry in installed.select(group=group):
            named[entry.name].append(entry)
        for name, entries in sorted(named.items()):
            packages = sorted(_package(e) for e in entries)
            if len(entries) > 1:
                text = f"{' and '.join(packages)} provide the same name; uninstall one of them"
                problems.append(Problem(name, ", ".join(packages), text))
            elif fault := _register(manager, entries[0]):
                problems.append(Problem(name, packages[0], fault))
            elif group == SCHEMES:
                loaded[name] = entries[0]
    plugins = {name: manager.get_plugin(f"{SCHEMES}:{name}") for name in loaded}
    schemes = {name: _scheme(manager, name, entry, plugins) for name, entry in loaded.items()}
    return Registry(schemes, tuple(problems))


def _register(manager: pluggy.PluginManager, entry: metadata.EntryPoint) -> str | None:
    """Load and register one plugin; returns what is wrong with it, in one line, or None."""
    name = f"{entry.group}:{entry.name}"
    try:
        # before it is imported: it may ask for a later core's names
        if entry.dist and (fault := version_fault(entry.dist.name)):
            return fault
        plugin = entry.load()
        if fault := hook_fault(manager, plugin):
            return fault
        manager.register(plugin, name)
        manager.check_pending()
        hooks = _implemented(manager, plugin)
        if not hooks:
            raise ValueError("no function is marked @bitpress.hookimpl")
        answers = [
            hook for hook, found in hooks.items() if not (found.wrapper or found.hookwrapper)
        ]
        if entry.group == EXTENSIONS and answers:
            raise ValueError(
                f"an extension only wraps: mark {answers[0]} with hookimpl(wrapper=True)"
            )
        options_type = getattr(plugin, "Options", Options)
        if not (isinstance(options_type, type) and issubclass(options_type, Options)):
            raise TypeError("Options is not a subclass of bitpress.Options")
        # the defaults must be a sound choice
        build(options_type, {}, entry.name)
    except (Exception, SystemExit) as e:
        # whatever a stranger's module does while it is imported
        if manager.has_plugin(name):
            manager.unregister(name=name)
        return f"{type(e).__name__}: {' '.join(str(e).split())}"
    return None


def _scheme(
    manager: pluggy.PluginManager, name: str, entry: metadata.EntryPoint, plugins: Mapping[str, Any]
) -> Scheme:
    plugin = plugins[name]
    others = [other for n, other in plugins.items() if n != name]
    return Scheme(
        name=name,
        package=_package(entry),
        version=entry.dist.version if entry.dist else "unknown",
        summary=" ".join((plugin.__doc__ or "").strip().split("\n\n")[0].split()),
        options_type=getattr(plugin, "Options", Options),
        hooks={spec: manager.subset_hook_caller(spec, others) for spec in _hook_names(manager)},
        arguments={hook: found.argnames for hook, found in _implemented(manager, plugin).items()},
    )


def _implemented(manager: pluggy.PluginManager, plugin: Any) -> dict[str, pluggy.HookImpl]:
    """A plugin's own implementations by hook."""
    callers = manager.get_hookcallers(plugin) or []
    return {
        caller.name: found
        for caller in callers
        for found in caller.get_hookimpls()
        if found.plugin is plugin
    }


def _hook_names(manager: pluggy.PluginManager) -> list[str]:
    return [name for name in vars(manager.hook) if not name.startswith("_")]


def _package(entry: metadata.EntryPoint) -> str:
    return entry.dist.name if entry.dist else "unknown package"
