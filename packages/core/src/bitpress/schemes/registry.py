"""Installed schemes, found by their entry points; one that is broken is reported and leaves the
others working.
"""

from __future__ import annotations

import functools
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import pluggy
from attrs import field, frozen

from bitpress.errors import BitpressError, RecipeError, SchemeError, did_you_mean, is_out_of_memory
from bitpress.schemes import hookspecs
from bitpress.schemes.compatibility import hook_fault, hook_names, version_fault
from bitpress.schemes.deprecation import PluginManager
from bitpress.schemes.options import Options, build_options
from bitpress.schemes.values import EFFORT_LEVELS, NORMAL_EFFORT, MeasuredLoss

# Entry point groups.
SCHEMES, EXTENSIONS = "bitpress.schemes", "bitpress.extensions"

# What to tell a user of a registry without schemes.
NO_SCHEMES = (
    "no schemes are installed; each is a package of its own: pip install bitpress-scheme-NAME"
)


@frozen(eq=False)
class Scheme:
    """One installed scheme.

    Attributes:
        name: of its entry point.
        package: the distribution that provides it.
        version: of the package.
        summary: the first paragraph of the plugin's docstring, in one line.
        options_type: what users may set, a subclass of `bitpress.Options`.
        aliases: other names that users know, each with the options that it stands for.
        losses: that were measured on some models.
        efforts: by level, the options that differ there from the default ones.
    """

    name: str
    package: str
    version: str
    summary: str
    options_type: type[Options]
    aliases: Mapping[str, Mapping[str, Any]]
    losses: tuple[MeasuredLoss, ...]
    efforts: Mapping[str, Mapping[str, Any]]
    _hooks: Mapping[str, pluggy.HookCaller] = field(repr=False)
    _arguments: Mapping[str, tuple[str, ...]] = field(repr=False)

    def has(self, hook: str) -> bool:
        """Whether the scheme implements the hook."""
        return hook in self._arguments

    def takes_argument(self, hook: str, argument: str) -> bool:
        """Whether the scheme implements the hook and names the argument."""
        return argument in self._arguments.get(hook, ())

    @property
    def quantizes_cache(self) -> bool:
        """Whether it is for the keys and values that an engine keeps, and not for linear layers."""
        return self.has("serialize_cache")

    def calibrated(self, options: Options) -> bool:
        """Whether the model must be run on data."""
        if options.calibrated is not None:
            return options.calibrated
        return self.quantizes_cache or self.takes_argument("observe", "inputs")

    def losses_of(
        self, options: Mapping[str, Any], then: str | None = None
    ) -> tuple[MeasuredLoss, ...]:
        """Losses that were measured with these options, and with this scheme after it."""
        return tuple(loss for loss in self.losses if loss.options == options and loss.then == then)

    def step(self, values: Mapping[str, Any] | None = None) -> Step:
        """The scheme with options, ready to be applied.

        Raises:
            RecipeError: an option that it does not take.
        """
        return Step(self, build_options(self.options_type, values or {}, self.name))

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
            # No fault of the scheme's.
            if is_out_of_memory(e):
                raise
            text = str(e).splitlines()[0] if str(e) else "no message"
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


@frozen(eq=False)
class SchemeMatch:
    """What a user's name of a scheme stands for.

    Attributes:
        options: those that the name implies.
    """

    scheme: Scheme
    options: Mapping[str, Any] = field(factory=dict)

    def step(self, values: Mapping[str, Any], effort: str = NORMAL_EFFORT) -> Step:
        """The scheme with the options of a level of effort, which those that the name implies
        override, and these `values`.
        """
        return self.scheme.step({**self.scheme.efforts.get(effort, {}), **self.options, **values})

    def describe_alias(self, name: str) -> str:
        """One line that says what was taken for a name."""
        options = ", ".join(f"{option}={value}" for option, value in self.options.items())
        return f"{name}: taken as {self.scheme.name} with {options or 'its defaults'}"


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
        """The scheme of that name; raises RecipeError as `find` does."""
        return self.find(name).scheme

    def canonical_name(self, name: str) -> str:
        """The name of the scheme that a user's name stands for; the same where there is none."""
        match = self._match(name)
        return match.scheme.name if match else name

    def find(self, name: str) -> SchemeMatch:
        """The scheme of a name, in which capitals do not count, or of an alias.

        Raises:
            RecipeError: it is not installed, and the message names the nearest that is; or it is
                broken.
        """
        if match := self._match(name):
            return match
        for problem in self.problems:
            if _plain(problem.name) == _plain(name):
                raise RecipeError(
                    f"scheme {name} of {problem.package} cannot be used: {problem.text}"
                )
        alike = [known for known in self.schemes if _is_misspelled(_plain(name), known)]
        hint = did_you_mean(_plain(name), alike)
        installed = ", ".join(self.schemes) or "none"
        raise RecipeError(
            f"scheme {name!r} is not installed{hint} (installed: {installed}); schemes are "
            "packages, bitpress-scheme-NAME: pip install the one that provides it"
        )

    def _match(self, name: str) -> SchemeMatch | None:
        if name in self.schemes:
            return SchemeMatch(self.schemes[name])
        # A broken scheme's own name is no alias of another's.
        if any(_plain(problem.name) == _plain(name) for problem in self.problems):
            return None
        for scheme in self.schemes.values():
            if _plain(scheme.name) == _plain(name):
                return SchemeMatch(scheme)
        for scheme in self.schemes.values():
            for alias, options in scheme.aliases.items():
                if _plain(alias) == _plain(name):
                    return SchemeMatch(scheme, options)
        return None


def _plain(name: str) -> str:
    """A name without what people write in different ways: `MY_SCHEME` is `my-scheme`."""
    return name.lower().replace("_", "-")


def _is_misspelled(name: str, scheme: str) -> bool:
    """Whether a name is that of a scheme but for one letter, or for one that stands elsewhere.

    Names of formats are short: what differs in more, or in a digit, is another format.
    """
    is_other_format = sorted(re.findall(r"\d", name)) != sorted(re.findall(r"\d", scheme))
    if is_other_format or abs(len(name) - len(scheme)) > 1:
        return False
    return not _without_a_letter(name).isdisjoint(_without_a_letter(scheme))


def _without_a_letter(name: str) -> set[str]:
    return {name, *(name[:i] + name[i + 1 :] for i in range(len(name)))}


@functools.cache
def discover() -> Registry:
    """All installed schemes, with the installed extensions around them."""
    manager = PluginManager("bitpress")
    manager.add_hookspecs(hookspecs)
    problems: list[Problem] = []
    registered: dict[str, metadata.EntryPoint] = {}
    entry_points = metadata.entry_points()
    for group in (EXTENSIONS, SCHEMES):
        entries_by_name = defaultdict(list)
        for entry in entry_points.select(group=group):
            entries_by_name[entry.name].append(entry)
        for name, entries in sorted(entries_by_name.items()):
            packages = sorted(_package(entry) for entry in entries)
            if len(entries) > 1:
                text = f"{' and '.join(packages)} provide the same name; uninstall one of them"
                problems.append(Problem(name, ", ".join(packages), text))
            elif fault := _register(manager, entries[0]):
                problems.append(Problem(name, packages[0], fault))
            elif group == SCHEMES:
                registered[name] = entries[0]
    plugins = {name: manager.get_plugin(f"{SCHEMES}:{name}") for name in registered}
    schemes = {
        name: _make_scheme(manager, name, entry, plugins) for name, entry in registered.items()
    }
    return Registry(schemes, tuple(problems))


def _register(manager: pluggy.PluginManager, entry: metadata.EntryPoint) -> str | None:
    """Load and register one plugin; returns what is wrong with it, in one line, or None."""
    name = f"{entry.group}:{entry.name}"
    try:
        # Before it is imported, since its module may import names of a later core.
        if entry.dist and (fault := version_fault(entry.dist.name)):
            return fault
        plugin = entry.load()
        if fault := hook_fault(manager, plugin):
            return fault
        manager.register(plugin, name)
        manager.check_pending()
        _check_plugin(manager, plugin, entry)
    except (Exception, SystemExit) as e:
        # A stranger's module may do anything while it is imported: the others must keep working.
        if manager.has_plugin(name):
            manager.unregister(name=name)
        return f"{type(e).__name__}: {' '.join(str(e).split())}"
    return None


def _check_plugin(manager: pluggy.PluginManager, plugin: Any, entry: metadata.EntryPoint) -> None:
    hooks = _hook_implementations(manager, plugin)
    if not hooks:
        raise ValueError("no function is marked @bitpress.hookimpl")
    if entry.group == EXTENSIONS:
        for hook, implementation in hooks.items():
            if not (implementation.wrapper or implementation.hookwrapper):
                raise ValueError(
                    f"an extension only wraps: mark {hook} with hookimpl(wrapper=True)"
                )

    options_type = getattr(plugin, "Options", Options)
    if not (isinstance(options_type, type) and issubclass(options_type, Options)):
        raise TypeError("Options is not a subclass of bitpress.Options")
    # The defaults must pass the scheme's own validators, and what other names imply too.
    build_options(options_type, {}, entry.name)
    implied = [*_aliases(plugin).values(), *_efforts(plugin).values()]
    implied += [loss.options for loss in _losses(plugin)]
    for options in implied:
        build_options(options_type, options, entry.name)


def _aliases(plugin: Any) -> Mapping[str, Mapping[str, Any]]:
    """A plugin's `ALIASES`: names that users may know its scheme by, with options."""
    aliases = getattr(plugin, "ALIASES", {})
    if not isinstance(aliases, Mapping) or not all(
        isinstance(alias, str) and isinstance(options, Mapping)
        for alias, options in aliases.items()
    ):
        raise TypeError("ALIASES is not a dict of names, each with a dict of options")
    return aliases


def _efforts(plugin: Any) -> Mapping[str, Mapping[str, Any]]:
    """A plugin's `EFFORTS`: the options of levels of effort."""
    efforts = getattr(plugin, "EFFORTS", {})
    levels = [level for level in EFFORT_LEVELS if level != NORMAL_EFFORT]
    if not isinstance(efforts, Mapping) or not all(
        level in levels and isinstance(options, Mapping) for level, options in efforts.items()
    ):
        raise TypeError(f"EFFORTS is not a dict of {' and '.join(levels)}, each a dict of options")
    return efforts


def _losses(plugin: Any) -> tuple[MeasuredLoss, ...]:
    """A plugin's `MEASURED_LOSSES`."""
    losses = getattr(plugin, "MEASURED_LOSSES", ())
    if not isinstance(losses, Sequence) or not all(isinstance(x, MeasuredLoss) for x in losses):
        raise TypeError("MEASURED_LOSSES is not a list of bitpress.MeasuredLoss")
    return tuple(losses)


def _make_scheme(
    manager: pluggy.PluginManager, name: str, entry: metadata.EntryPoint, plugins: Mapping[str, Any]
) -> Scheme:
    plugin = plugins[name]
    # Its hook callers leave out the other schemes, and keep the extensions.
    others = [other for other_name, other in plugins.items() if other_name != name]
    implementations = _hook_implementations(manager, plugin)
    return Scheme(
        name=name,
        package=_package(entry),
        version=entry.dist.version if entry.dist else "unknown",
        summary=" ".join((plugin.__doc__ or "").strip().split("\n\n")[0].split()),
        options_type=getattr(plugin, "Options", Options),
        aliases=_aliases(plugin),
        losses=_losses(plugin),
        efforts=_efforts(plugin),
        hooks={hook: manager.subset_hook_caller(hook, others) for hook in hook_names(manager)},
        arguments={hook: hookimpl.argnames for hook, hookimpl in implementations.items()},
    )


def _hook_implementations(manager: pluggy.PluginManager, plugin: Any) -> dict[str, pluggy.HookImpl]:
    """A plugin's implementations, by hook."""
    callers = manager.get_hookcallers(plugin) or []
    return {
        caller.name: hookimpl
        for caller in callers
        for hookimpl in caller.get_hookimpls()
        if hookimpl.plugin is plugin
    }


def _package(entry: metadata.EntryPoint) -> str:
    return entry.dist.name if entry.dist else "unknown package"
