"""Which layers get which steps: from a scheme's name and settings, or from a TOML file."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
from attrs import field, frozen

from bitpress.checkpoint.layer_names import INDEX_PART
from bitpress.errors import RecipeError, did_you_mean
from bitpress.planning.layer_pattern import REGEX, matches, require_valid
from bitpress.schemes.options import format_value
from bitpress.schemes.registry import Registry, SchemeMatch, Step
from bitpress.schemes.values import NORMAL_EFFORT

# A recipe file has at most so many bytes ...
MAX_FILE_BYTES = 100_000

# ... and characters in a line, because a key of very many parts takes tomllib very long.
MAX_LINE_LENGTH = 4000


@frozen
class Rule:
    """The steps, in order, of the layers whose names match a pattern; without steps these layers
    are copied unchanged.
    """

    match: str
    steps: tuple[Step, ...]


@frozen
class RuleTable:
    """A `[[layers]]` table of a recipe, before its schemes are looked up.

    Attributes:
        patterns: of layer names.
        steps: the name and the options of each scheme, in order.
    """

    patterns: Sequence[str]
    steps: Sequence[tuple[str, Mapping[str, Any]]]


@frozen
class RecipeChanges:
    """What a user changes in a recipe, or in what its schemes do by themselves.

    Attributes:
        settings: `[SCHEME.]OPTION=VALUE` texts, which override all other options.
        ignore: patterns of layers to copy unchanged.
        effort: the level whose options schemes get where neither the recipe nor `settings` say
            anything else.
    """

    settings: Iterable[str] = ()
    ignore: Iterable[str] = ()
    effort: str = NORMAL_EFFORT


@frozen
class Recipe:
    """Which layers get which steps.

    Attributes:
        rules: the first that matches a layer counts.
        ignore: patterns of layers that are copied unchanged, whatever the rules say.
        notes: a line for each name of a scheme that was taken for another, and for each scheme
            that was asked for at another level of effort than the normal one.
    """

    rules: tuple[Rule, ...]
    ignore: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=(), eq=False)

    @property
    def all_steps(self) -> tuple[Step, ...]:
        """Every step of every rule."""
        return tuple(step for rule in self.rules for step in rule.steps)

    @property
    def scheme_versions(self) -> dict[str, str]:
        """The package of every scheme and its version, by the scheme's name."""
        return {
            step.scheme.name: f"{step.scheme.package} {step.scheme.version}"
            for step in self.all_steps
        }

    @property
    def calibrated(self) -> bool:
        """Whether any step must see the model run on data."""
        return any(step.calibrated for step in self.all_steps)

    @property
    def rotates(self) -> bool:
        """Whether any step asks for a rotated model: then all layers are rotated."""
        return any(step.options.rotates for step in self.all_steps)

    @property
    def full_reference(self) -> bool:
        """Whether any step asks for all texts to be run through the source too."""
        return any(step.options.full_reference for step in self.all_steps)

    @property
    def needs_reference(self) -> bool:
        """Whether any step must see a layer's inputs in the source model too, or its gradients."""
        # torch is imported where steps are asked, and not to read a recipe
        from bitpress.schemes import pipeline

        return self.needs_gradients or any(map(pipeline.takes_reference, self.all_steps))

    @property
    def needs_gradients(self) -> bool:
        """Whether any step takes statistics of the gradients of outputs."""
        # torch is imported where steps are asked, and not to read a recipe
        from bitpress.schemes import pipeline

        return any(map(pipeline.takes_gradient, self.all_steps))

    def assign(
        self, modules: Sequence[str], others: Sequence[str] = ()
    ) -> Mapping[str, tuple[Step, ...]]:
        """The steps of every module; empty where it is copied unchanged.

        Args:
            others: modules that are left alone in any case, which may be ignored too.

        Raises:
            RecipeError: a pattern matches no module; the message names the nearest.
        """
        patterns = [(rule.match, modules) for rule in self.rules]
        patterns += [(pattern, [*modules, *others]) for pattern in self.ignore]
        for pattern, candidates in patterns:
            require_valid(pattern)
            if not any(matches(module, pattern) for module in candidates):
                raise RecipeError(
                    f"the pattern {pattern!r} matches none of the {len(modules)} linear layers"
                    f"{_suggest(pattern, modules)} (embeddings, lm_head, norms, routers and vision "
                    "towers are left alone in any case)"
                )
        return {module: self.steps(module) for module in modules}

    def as_json(self) -> dict[str, Any]:
        """The recipe with the value of every option, as `bitpress.json` holds it."""
        layers = [
            {
                "match": rule.match,
                "steps": [
                    {"use": step.scheme.name, **attrs.asdict(step.options)} for step in rule.steps
                ],
            }
            for rule in self.rules
        ]
        return {"layers": layers, "ignore": list(self.ignore)}

    def steps(self, module: str) -> tuple[Step, ...]:
        """The steps of one module; empty where it is copied unchanged."""
        if any(matches(module, pattern) for pattern in self.ignore):
            return ()
        return next((rule.steps for rule in self.rules if matches(module, rule.match)), ())

    def reason(self, module: str) -> str:
        """Which pattern gives a module its steps, in a few words."""
        pattern = next((p for p in self.ignore if matches(module, p)), None)
        if pattern is not None:
            return f"ignored by {pattern!r}"
        rule = next((rule for rule in self.rules if matches(module, rule.match)), None)
        if rule is None:
            return "no rule matches it"
        return f"the rule for {rule.match!r}" + ("" if rule.steps else " has no steps")

    def idle_patterns(self, modules: Sequence[str]) -> list[str]:
        """Patterns of rules that no module gets its steps from: earlier rules or `ignore` match all
        that they match.
        """
        reasons = {self.reason(module) for module in modules}
        return [
            rule.match
            for rule in self.rules
            if not any(reason.startswith(f"the rule for {rule.match!r}") for reason in reasons)
        ]


def _suggest(pattern: str, modules: Sequence[str]) -> str:
    """For a name the nearest layer, for a pattern the nearest that matches a layer; an example of a
    name where none is near.
    """
    example = f"; their names are like {modules[0]!r}" if modules else ""
    if pattern.startswith(REGEX):
        return example
    if not any(sign in pattern for sign in "*?["):
        return did_you_mean(pattern, modules) or example
    patterns: dict[str, None] = {}
    for name in dict.fromkeys(INDEX_PART.sub("*", module) for module in modules):
        words = name.split(".")
        heads = [".".join([*words[:i], "*"]) for i in range(1, len(words))]
        tails = [".".join(["*", *words[i:]]) for i in range(1, len(words))]
        inner = [f"*.{word}.*" for word in words[1:-1]]
        patterns |= dict.fromkeys(p for p in [name, *heads, *tails, *inner] if "*.*" not in p)
    return did_you_mean(pattern, patterns) or example


def from_scheme(name: str, registry: Registry, changes: RecipeChanges = RecipeChanges()) -> Recipe:
    """The recipe of `--scheme NAME` for every linear layer of the decoder blocks.

    Args:
        name: of a scheme, or several joined by `+`, which become steps from left to right.
        changes: of the schemes' options, and layers to copy unchanged.
    """
    matches_by_name = {n: registry.find(n) for n in name.split("+")}
    schemes = [match.scheme.name for match in matches_by_name.values()]
    overrides = _parse_settings(changes.settings, schemes, registry)
    steps = tuple(
        match.step(overrides[match.scheme.name], changes.effort)
        for match in map(matches_by_name.__getitem__, name.split("+"))
    )
    notes = _describe_aliases(matches_by_name) + _describe_effort(steps, changes.effort)
    return Recipe((Rule("*", steps),), tuple(changes.ignore), notes)


def from_file(file: Path, registry: Registry, changes: RecipeChanges = RecipeChanges()) -> Recipe:
    """The recipe of a TOML file, with changes.

    Raises:
        RecipeError: the file cannot be read, or is not a recipe; the message names the table.
    """
    try:
        if file.exists() and (not file.is_file() or file.stat().st_size > MAX_FILE_BYTES):
            raise RecipeError(
                f"{file}: a recipe is a regular file of at most {MAX_FILE_BYTES} bytes"
            )
        text = file.read_text(encoding="utf-8")
        if any(len(line) > MAX_LINE_LENGTH for line in text.splitlines()):
            raise RecipeError(
                f"{file}: a line has more than {MAX_LINE_LENGTH} characters; break it"
            )
        table = tomllib.loads(text)
    except OSError as e:
        raise RecipeError(f"{file}: {e.strerror or e}") from None
    except (ValueError, RecursionError) as e:
        raise RecipeError(f"{file}: not valid TOML ({e})") from None
    return from_json(table, registry, str(file), changes)


def from_json(
    table: Mapping[str, Any],
    registry: Registry,
    origin: str,
    changes: RecipeChanges = RecipeChanges(),
) -> Recipe:
    """The recipe of a table `{"layers": [{"match", "steps"}], "ignore": [...]}`.

    Args:
        origin: what errors call the table.
        changes: of its options, and patterns added to those that it ignores.
    """
    tables = parse_rules(table, origin)
    matches_by_name = {name: registry.find(name) for rule in tables for name, _ in rule.steps}
    schemes = dict.fromkeys(match.scheme.name for match in matches_by_name.values())
    overrides = _parse_settings(changes.settings, list(schemes), registry)

    rules: list[Rule] = []
    for rule in tables:
        steps = []
        for name, options in rule.steps:
            match = matches_by_name[name]
            values = {**options, **overrides[match.scheme.name]}
            steps.append(match.step(values, changes.effort))
        rules += [Rule(pattern, tuple(steps)) for pattern in rule.patterns]
    all_steps = [step for rule in rules for step in rule.steps]
    notes = _describe_aliases(matches_by_name) + _describe_effort(all_steps, changes.effort)
    return Recipe(tuple(rules), (*table.get("ignore", []), *changes.ignore), notes)


def _describe_aliases(matches_by_name: Mapping[str, SchemeMatch]) -> tuple[str, ...]:
    return tuple(
        match.describe_alias(name)
        for name, match in matches_by_name.items()
        if name != match.scheme.name
    )


def _describe_effort(steps: Sequence[Step], effort: str) -> tuple[str, ...]:
    """For each scheme a line that says which options of a level it got; none at the normal one."""
    if effort == NORMAL_EFFORT:
        return ()
    lines = []
    for step in steps:
        options = step.scheme.efforts.get(effort, {})
        level_options = step.scheme.step(options).options
        # those that the user has set otherwise win over the level
        settings = [
            f"{name}={format_value(getattr(step.options, name))}"
            for name in options
            if getattr(step.options, name) == getattr(level_options, name)
        ]
        choice = f"with {', '.join(settings)}" if settings else "as at normal effort"
        lines.append(f"effort {effort}: {step.scheme.name} {choice}")
    return tuple(dict.fromkeys(lines))


def parse_rules(table: Mapping[str, Any], origin: str) -> list[RuleTable]:
    """The `[[layers]]` of a recipe; their schemes and options are not looked up.

    Raises:
        RecipeError: the table has another form.
    """
    _check_keys(table, ("layers", "ignore"), origin)
    layers, ignored = table.get("layers"), table.get("ignore", [])
    if not isinstance(layers, list) or not layers:
        raise RecipeError(f"{origin}: it needs at least one [[layers]] with `match` and `steps`")
    if not isinstance(ignored, list) or not all(isinstance(p, str) for p in ignored):
        raise RecipeError(f"{origin}: `ignore` is a list of patterns")
    return [
        _parse_rule(layer, f"{origin}: [[layers]] number {number}")
        for number, layer in enumerate(layers, 1)
    ]


def _parse_rule(table: Any, origin: str) -> RuleTable:
    match = table.get("match") if isinstance(table, dict) else None
    patterns = [match] if isinstance(match, str) else match
    if (
        not isinstance(patterns, list)
        or not patterns
        or not all(isinstance(pattern, str) for pattern in patterns)
    ):
        raise RecipeError(
            f"{origin}: it needs `match` (a pattern, or a list of them) and `steps` (a list of "
            "schemes, [] for none)"
        )
    if not isinstance(table.get("steps"), list):
        raise RecipeError(f"{origin}: it needs `steps` (a list of schemes, [] for none)")
    _check_keys(table, ("match", "steps"), origin)

    steps = []
    for step in table["steps"]:
        options = {"use": step} if isinstance(step, str) else step
        if not isinstance(options, dict) or not isinstance(options.get("use"), str):
            raise RecipeError(
                f'{origin}: a step is a scheme\'s name or {{ use = "NAME", option = value }}, not '
                f"{step!r}"
            )
        steps.append((options["use"], {k: v for k, v in options.items() if k != "use"}))
    return RuleTable(patterns, steps)


def _check_keys(table: Mapping[str, Any], keys: Sequence[str], origin: str) -> None:
    for key in table:
        if key not in keys:
            raise RecipeError(f"{origin}: unknown key {key!r}{did_you_mean(key, keys)}")


def _parse_settings(
    settings: Iterable[str], schemes: Sequence[str], registry: Registry
) -> dict[str, dict[str, Any]]:
    """The values of `[SCHEME.]OPTION=VALUE` texts by scheme and option; an option without a scheme
    belongs to the one scheme that has it.
    """
    values: dict[str, dict[str, Any]] = {scheme: {} for scheme in schemes}
    for setting in settings:
        target, equals, value = setting.partition("=")
        scheme, dot, option = target.rpartition(".")
        if not equals or not option:
            raise RecipeError(
                f"--set {setting}: it should read OPTION=VALUE or SCHEME.OPTION=VALUE"
            )
        if dot and scheme not in values:
            scheme = registry.canonical_name(scheme)
        if dot and scheme not in values:
            raise RecipeError(
                f"--set {setting}: the scheme {scheme!r} is not used here"
                f"{did_you_mean(scheme, schemes)}"
            )
        if dot:
            values[scheme][option] = value
            continue

        owners = [s for s in schemes if option in attrs.fields_dict(registry.get(s).options_type)]
        if len(owners) > 1:
            raise RecipeError(
                f"--set {setting}: {' and '.join(owners)} both have it; write {owners[0]}.{setting}"
            )
        # The first scheme reports an option that none of them has.
        values[(owners or list(schemes))[0]][option] = value
    return values
