"""A recipe file and its tables, before schemes and options are looked up."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import frozen

from bitpress.errors import RecipeError, did_you_mean

# A recipe file has at most so many bytes ...
MAX_FILE_BYTES = 100_000

# ... and characters in a line, because a key of very many parts takes tomllib very long.
MAX_LINE_LENGTH = 4000


@frozen
class RuleTable:
    """A `[[layers]]` table of a recipe, before its schemes are looked up.

    Attributes:
        patterns: of layer names.
        steps: the name and the options of each scheme, in order.
    """

    patterns: Sequence[str]
    steps: Sequence[tuple[str, Mapping[str, Any]]]


def read_file(file: Path) -> dict[str, Any]:
    """The table of a TOML file.

    Raises:
        RecipeError: it cannot be read, or is not TOML.
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
    return table


def parse_rules(table: Mapping[str, Any], origin: str) -> list[RuleTable]:
    """The `[[layers]]` of a recipe; their schemes and options are not looked up.

    Raises:
        RecipeError: the table has another form.
    """
    _check_keys(table, ("layers", "ignore", "cache"), origin)
    layers, ignored = table.get("layers", []), table.get("ignore", [])
    if not isinstance(layers, list) or not (layers or "cache" in table):
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

    return RuleTable(patterns, [_parse_step(step, origin) for step in table["steps"]])


def parse_cache(table: Mapping[str, Any], origin: str) -> tuple[str, Mapping[str, Any]] | None:
    """The name and the options of a recipe's scheme for the cache, which are not looked up; None
    where it has none.

    Raises:
        RecipeError: it has another form.
    """
    return _parse_step(table["cache"], f"{origin}: `cache`") if "cache" in table else None


def _parse_step(step: Any, origin: str) -> tuple[str, Mapping[str, Any]]:
    options = {"use": step} if isinstance(step, str) else step
    if not isinstance(options, dict) or not isinstance(options.get("use"), str):
        raise RecipeError(
            f'{origin}: a step is a scheme\'s name or {{ use = "NAME", option = value }}, not '
            f"{step!r}"
        )
    return options["use"], {k: v for k, v in options.items() if k != "use"}


def _check_keys(table: Mapping[str, Any], keys: Sequence[str], origin: str) -> None:
    for key in table:
        if key not in keys:
            raise RecipeError(f"{origin}: unknown key {key!r}{did_you_mean(key, keys)}")
