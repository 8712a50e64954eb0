"""Which layers get which steps: from a scheme's name and settings, or from a TOML file."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import attrs
from attrs import frozen

from bitpress.errors import RecipeError, nearest
from bitpress.schemes.registry import Registry, Step

# bytes of a recipe
LARGEST = 100_000

# characters of a line
WIDEST = 4000

# characters of a pattern
LONGEST = 1000


@frozen
class Rule:
    """Layers whose name matches the pattern get these steps, in order; none leaves them as they
    are.
    """

    match: str
    steps: tuple[Step, ...]


@frozen
class Recipe:
    """Rules, of which the first that matches a layer counts, and patterns of layers that no rule
    may touch.
    """

    rules: tuple[Rule, ...]
    ignore: tuple[str, ...] = ()

    @property
    def all_steps(self) -> tuple[Step, ...]:
        """Every step of every rule."""
        return tuple(step for rule in self.rules for step in rule.steps)

    @property
    def calibrated(self) -> bool:
        """Whether any step must see the model run on data."""
        return any(step.calibrated for step in self.all_steps)

    @property
    def compares(self) -> bool:
        """Whether any step asks what the source makes of the same tokens."""
        return any(
            step.calibrated and step.scheme.wants("observe", "reference") for step in self.all_steps
        )

    def assign(self, modules: Sequence[str]) -> Mapping[str, tuple[Step, ...]]:
        """The steps of every module, empty where it is left alone.

        Raises:
            RecipeError: a pattern matches no module; the message names the nearest.
        """
        patterns = [rule.match for rule in self.rules] + list(self.ignore)
        for pattern in patterns:
            if len(pattern) > LONGEST:
                raise RecipeError(
                    f"the pattern {pattern[:40]!r}... has {len(pattern)} characters; at most "
                    f"{LONGEST} are taken"
                )
            if not any(fnmatchcase(module, pattern) for module in modules):
                raise RecipeError(
                    f"the pattern {pattern!r} matches none of the {len(modules)} linear layers"
                    f"{_hint(pattern, modules)} (embeddings, lm_head, norms, routers and vision "
                    "towers are left alone in any case)"
                )
        return {module: self.steps(module) for module in modules}

    def as_json(self) -> dict[str, Any]:
        """The recipe with every option spelled out, as `bitpress.json` keeps it and `from_json`
        reads it.
        """
        layers = [
            {
                "match": rule.match,
                "steps": [{"use": s.scheme.name, **attrs.asdict(s.options)} for s in rule.steps],
            }
            for rule in self.rules
        ]
        return {"layers": layers, "ignore": list(self.ignore)}

    def steps(self, module: str) -> tuple[Step, ...]:
        """The steps of one module, empty where it is left alone."""
        if any(fnmatchcase(module, pattern) for pattern in self.ignore):
            return ()
        return next((rule.steps for rule in self.rules if fnmatchcase(module, rule.match)), ())

    def reason(self, module: str) -> str:
        """Why a module gets the steps that it gets."""
        pattern = next((p for p in self.ignore if fnmatchcase(module, p)), None)
        if pattern is not None:
            return f"ignored by {pattern!r}"
        rule = next((rule for rule in self.rules if fnmatchcase(module, rule.match)), None)
        if rule is None:
            return "no rule matches it"
        return f"the rule for {rule.match!r}" + ("" if rule.steps else " has no steps")

    def idle_patterns(self, modules: Sequence[str]) -> list[str]:
        """Patterns of rules that come too late: other rules, or what is ignored, take all that they
        match.
        """
        used = {self.reason(module) for module in modules}
        return [
            r.match
            for r in self.rules
            if not any(reason.startswith(f"the rule for {r.match!r}") for reason in used)
        ]


def _hint(pattern: str, modules: Sequence[str]) -> str:
    """The nearest name for a name, and for a pattern the nearest of those that match something,
    with stars for block numbers.

    Where none is near, what names look like.
    """
    like = f"; their names are like {modules[0]!r}" if modules else ""
    if not any(sign in pattern for sign in "*?["):
        return nearest(pattern, modules) or like
    known: dict[str, None] = {}
    for name in dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", module) for module in modules):
        words = name.split(".")
        heads = [".".join([*words[:i], "*"]) for i in range(1, len(words))]
        tails = [".".join(["*", *words[i:]]) for i in range(1, len(words))]
        inner = [f"*.{word}.*" for word in words[1:-1]]
        known |= dict.fromkeys(cut for cut in [name, *heads, *tails, *inner] if "*.*" not in cut)
    return nearest(pattern, known) or like


def from_scheme(
    name: str, registry: Registry, settings: Iterable[str] = (), ignore: Iterable[str] = ()
) -> Recipe:
    """The recipe of `--scheme NAME`, where `+` joins steps from left to right, for every linear
    layer of the decoder blocks.
    """
    names = name.split("+")
    values = _settings(settings, names, registry)
    steps = tuple(registry.get(n).step(values[n]) for n in names)
    return Recipe((Rule("*", steps),), tuple(ignore))


def from_file(
    file: Path, registry: Registry, settings: Iterable[str] = (), ignore: Iterable[str] = ()
) -> Recipe:
    """The recipe of a TOML file; `settings` override its options, `ignore` adds to it.

    Raises:
        RecipeError: the file cannot be read, or is not a recipe; the message names the place.
    """
    try:
        if (file.exists() and not file.is_file()) or (
            file.exists() and file.stat().st_size > LARGEST
        ):
            raise RecipeError(f"{file}: a recipe is a regular file of at most {LARGEST} bytes")
        text = file.read_text(encoding="utf-8")
        # a key of very many parts takes tomllib very long
        if any(len(line) > WIDEST for line in text.splitlines()):
            raise RecipeError(f"{file}: a line has more than {WIDEST} characters; break it")
        table = tomllib.loads(text)
    except OSError as e:
        raise RecipeError(f"{file}: {e.strerror or e}") from None
    except (ValueError, RecursionError) as e:
        raise RecipeError(f"{file}: not valid TOML ({e})") from None
    return from_json(table, registry, str(file), settings, ignore)


def from_json(
    table: Mapping[str, Any],
    registry: Registry,
    place: str,
    settings: Iterable[str] = (),
    ignore: Iterable[str] = (),
) -> Recipe:
    """The recipe of a table `{"layers": [{"match", "steps"}], "ignore": [...]}`; `place` is named
    in errors.
    """
    found, ignored = parsed(table, place), table.get("ignore", [])
    values = _settings(
        settings, list(dict.fromkeys(use for _, steps in found for use, _ in steps)), registry
    )
    built = [
        (
            patterns,
            tuple(registry.get(use).step({**options, **values[use]}) for use, options in steps),
        )
        for patterns, steps in found
    ]
    return Recipe(
        tuple(Rule(pattern, steps) for patterns, steps in built for pattern in patterns),
        (*ignored, *ignore),
    )


def parsed(
    table: Mapping[str, Any], place: str
) -> list[tuple[list[str], list[tuple[str, dict[str, Any]]]]]:
    """The patterns of every rule, and its steps: each a scheme's name and options, of which nothing
    is known yet.
    """
    _known(table, ("layers", "ignore"), place)
    layers, ignored = table.get("layers"), table.get("ignore", [])
    if not isinstance(layers, list) or not layers:
        raise RecipeError(f"{place}: it needs at least one [[layers]] with `match` and `steps`")
    if not isinstance(ignored, list) or not all(isinstance(p, str) for p in ignored):
        raise RecipeError(f"{place}: `ignore` is a list of patterns")
    return [_rules(layer, f"{place}: [[layers]] number {i}") for i, layer in enumerate(layers, 1)]


def _rules(layer: Any, place: str) -> tuple[list[str], list[tuple[str, dict[str, Any]]]]:
    """A table's patterns, and their steps."""
    match = layer.get("match") if isinstance(layer, dict) else None
    patterns = [match] if isinstance(match, str) else match
    if (
        not isinstance(patterns, list)
        or not patterns
        or not all(isinstance(pattern, str) for pattern in patterns)
    ):
        raise RecipeError(
            f"{place}: it needs `match` (a pattern, or a list of them) and `steps` (a list of "
            "schemes, [] for none)"
        )
    if not isinstance(layer.get("steps"), list):
        raise RecipeError(f"{place}: it needs `steps` (a list of schemes, [] for none)")
    _known(layer, ("match", "steps"), place)
    steps = []
    for step in layer["steps"]:
        options = {"use": step} if isinstance(step, str) else step
        if not isinstance(options, dict) or not isinstance(options.get("use"), str):
            raise RecipeError(
                f'{place}: a step is a scheme\'s name or {{ use = "NAME", option = value }}, not '
                f"{step!r}"
            )
        steps.append((options["use"], {k: v for k, v in options.items() if k != "use"}))
    return patterns, steps


def _known(table: Mapping[str, Any], keys: Sequence[str], place: str) -> None:
    for key in table:
        if key not in keys:
            raise RecipeError(f"{place}: unknown key {key!r}{nearest(key, keys)}")


def _settings(
    settings: Iterable[str], names: Sequence[str], registry: Registry
) -> dict[str, dict[str, Any]]:
    """`[SCHEME.]OPTION=VALUE` texts as values by scheme; an option without a scheme goes to the one
    scheme that has it.
    """
    values: dict[str, dict[str, Any]] = {name: {} for name in names}
    for setting in settings:
        target, equals, value = setting.partition("=")
        scheme, dot, option = target.rpartition(".")
        if not equals or not option:
            raise RecipeError(
                f"--set {setting}: it should read OPTION=VALUE or SCHEME.OPTION=VALUE"
            )
        if dot and scheme not in values:
            raise RecipeError(
                f"--set {setting}: the scheme {scheme!r} is not used here{nearest(scheme, names)}"
            )
        having = [n for n in names if option in attrs.fields_dict(registry.get(n).options_type)]
        if not dot and len(having) > 1:
            raise RecipeError(
                f"--set {setting}: {' and '.join(having)} both have it; write {having[0]}.{setting}"
            )
        values[scheme if dot else (having or list(names))[0]][option] = value
    return values
