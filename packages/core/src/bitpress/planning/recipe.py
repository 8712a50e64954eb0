"""Which layers get which steps: from a scheme's name and settings, or from a TOML file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
from attrs import field, frozen

from bitpress.checkpoint.layer_names import INDEX_PART
from bitpress.errors import RecipeError, did_you_mean
from bitpress.planning import recipe_tables
from bitpress.planning.layer_pattern import REGEX, matches, require_valid
from bitpress.planning.recipe_tables import RuleTable
from bitpress.schemes.options import format_value
from bitpress.schemes.registry import Registry, SchemeMatch, Step
from bitpress.schemes.values import LEAST_EFFORT, NORMAL_EFFORT

# What a rule may call the head and the embeddings of any model.
HEAD, EMBEDDINGS = "lm_head", "embed_tokens"

# Name and options of the scheme for the cache.
CacheTable = tuple[str, Mapping[str, Any]]


@frozen
class Rule:
    """The steps, in order, of the layers whose names match a pattern; without steps these layers
    are copied unchanged.
    """

    match: str
    steps: tuple[Step, ...]


@frozen
class RecipeChanges:
    """What a user changes in a recipe, or in what its schemes do by themselves.

    Attributes:
        settings: `[SCHEME.]OPTION=VALUE` texts, which override all other options.
        ignore: patterns of layers to copy unchanged.
        head: the scheme of the head, or several joined by `+`; None leaves it as it is.
        embeddings: that of the embeddings.
        effort: the level whose options schemes get where neither the recipe nor `settings` say
            anything else.
        more_bits: whether layers may get more bits than the source holds them in.
    """

    settings: Iterable[str] = ()
    ignore: Iterable[str] = ()
    effort: str = NORMAL_EFFORT
    head: str | None = None
    embeddings: str | None = None
    more_bits: bool = False


@frozen
class Recipe:
    """Which layers get which steps.

    Attributes:
        rules: the first that matches a layer counts.
        ignore: patterns of layers that are copied unchanged, whatever the rules say.
        cache: how keys and values are kept while serving; None: as the model computes them.
        more_bits: whether layers may get more bits than the source holds them in.
        notes: a line for each name of a scheme that was taken for another, and for each scheme
            that was asked for at another level of effort than the normal one.
    """

    rules: tuple[Rule, ...]
    ignore: tuple[str, ...] = ()
    cache: Step | None = None
    more_bits: bool = field(default=False, eq=False)
    notes: tuple[str, ...] = field(default=(), eq=False)

    @property
    def all_steps(self) -> tuple[Step, ...]:
        """Every step of every rule, and that of the cache."""
        of_layers = tuple(step for rule in self.rules for step in rule.steps)
        return of_layers if self.cache is None else (*of_layers, self.cache)

    @property
    def scheme_versions(self) -> dict[str, str]:
        """The package of every scheme and its version, by the scheme's name."""
        return {
            step.scheme.name: f"{step.scheme.package} {step.scheme.version}"
            for step in self.all_steps
        }

    @property
    def rotates(self) -> bool:
        """Whether any step asks for a rotated model: then all layers are rotated."""
        return any(step.options.rotates for step in self.all_steps)

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
                    f"{_suggest(pattern, modules)} (norms, routers and vision towers are left "
                    "alone in any case, and lm_head and embed_tokens unless a rule names them)"
                )
        return {module: self.steps(module) for module in modules}

    def as_json(self) -> dict[str, Any]:
        """The recipe with the value of every option, as `bitpress.json` holds it."""
        layers = [
            {"match": rule.match, "steps": [_step_json(step) for step in rule.steps]}
            for rule in self.rules
        ]
        cache = {} if self.cache is None else {"cache": _step_json(self.cache)}
        return {"layers": layers, "ignore": list(self.ignore), **cache}

    def steps(self, module: str) -> tuple[Step, ...]:
        """The steps of one module; empty where it is copied unchanged."""
        if any(matches(module, pattern) for pattern in self.ignore):
            return ()
        return next((rule.steps for rule in self.rules if matches(module, rule.match)), ())

    def names(self, module: str) -> bool:
        """Whether a rule is for one module by its name, and not by a pattern."""
        return any(rule.match == module for rule in self.rules)

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


def _step_json(step: Step) -> dict[str, Any]:
    return {"use": step.scheme.name, **attrs.asdict(step.options)}


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
        name: of a scheme, or several joined by `+`, which become steps from left to right; one that
            is for the cache stands beside them.
        changes: of the schemes' options, and layers to copy unchanged.

    Raises:
        RecipeError: several of them are for the cache.
    """
    names = name.split("+")
    caches = [n for n in names if registry.find(n).scheme.quantizes_cache]
    if len(caches) > 1:
        raise RecipeError(f"{name}: {' and '.join(caches)} are both for the cache: name one")
    tables = [RuleTable(["*"], [(n, {}) for n in names if n not in caches])]
    cache: CacheTable | None = (caches[0], {}) if caches else None
    return _build_recipe(tables, cache, "--scheme", registry, changes)


def from_file(file: Path, registry: Registry, changes: RecipeChanges = RecipeChanges()) -> Recipe:
    """The recipe of a TOML file, with changes.

    Raises:
        RecipeError: the file cannot be read, or is not a recipe; the message names the table.
    """
    table = recipe_tables.read_file(file)
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
    recipe = _build_recipe(
        recipe_tables.parse_rules(table, origin),
        recipe_tables.parse_cache(table, origin),
        origin,
        registry,
        changes,
    )
    return attrs.evolve(recipe, ignore=(*table.get("ignore", []), *recipe.ignore))


def _build_recipe(
    tables: Sequence[RuleTable],
    cache_table: CacheTable | None,
    origin: str,
    registry: Registry,
    changes: RecipeChanges,
) -> Recipe:
    """The recipe of some tables, with changes.

    Args:
        origin: what errors call the tables.
    """
    for name, schemes in ((HEAD, changes.head), (EMBEDDINGS, changes.embeddings)):
        if schemes is not None:
            tables = [RuleTable([name], [(n, {}) for n in schemes.split("+")]), *tables]
    names = [name for rule in tables for name, _ in rule.steps]
    names += [cache_table[0]] if cache_table else []
    matches_by_name = {name: registry.find(name) for name in names}
    used = dict.fromkeys(match.scheme.name for match in matches_by_name.values())
    overrides = _parse_settings(changes.settings, list(used), registry)

    def make_step(name: str, options: Mapping[str, Any], effort: str, is_cache: bool) -> Step:
        match = matches_by_name[name]
        if match.scheme.quantizes_cache != is_cache:
            kinds = "`cache`, and not of layers", "layers: name it in `steps`, and not as `cache`"
            raise RecipeError(f"{origin}: {name} is a scheme of {kinds[is_cache]}")
        return match.step({**options, **overrides[match.scheme.name]}, effort)

    def make_rules(table: RuleTable, effort: str) -> list[Rule]:
        steps = tuple(make_step(name, options, effort, False) for name, options in table.steps)
        return [Rule(pattern, steps) for pattern in table.patterns]

    of_blocks = [table for table in tables if not {*table.patterns} <= {HEAD, EMBEDDINGS}]
    in_blocks = [rule for table in of_blocks for rule in make_rules(table, changes.effort)]
    has_data = any(step.calibrated for rule in in_blocks for step in rule.steps)
    rules = []
    for table in tables:
        # the head is fitted to data where blocks are; embeddings never are
        is_fitted = table in of_blocks or (has_data and {*table.patterns} == {HEAD})
        rules += make_rules(table, changes.effort if is_fitted else LEAST_EFFORT)
    cache = make_step(*cache_table, changes.effort, True) if cache_table else None
    recipe = Recipe(tuple(rules), tuple(changes.ignore), cache, changes.more_bits)
    notes = _describe_aliases(matches_by_name)
    leveled = attrs.evolve(recipe, rules=tuple(in_blocks)).all_steps
    return attrs.evolve(recipe, notes=notes + _describe_effort(leveled, changes.effort))


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
