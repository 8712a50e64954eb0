"""Patterns of layer names: a shell's (`*.down_proj`), and regular expressions as llm-compressor has
them (`re:.*down_proj$`).
"""

from __future__ import annotations

import functools
import re
from fnmatch import fnmatchcase

from bitpress.errors import RecipeError

# What begins a regular expression; compressed-tensors 0.14 matches it from the start of a name.
REGEX = "re:"

# fnmatch translates every pattern to a regular expression.
MAX_PATTERN_LENGTH = 1000

# Repetitions in a regular expression: each may multiply the time that a name takes by its length.
MAX_REPETITIONS = 3

# Characters of a name for the same reason.
MAX_NAME_LENGTH = 300

# A repetition without a small bound.
REPETITION = re.compile(r"(?<!\\)[*+{]")

# What repeats a group takes exponential time where the group repeats something itself; what the
# group has matched before can be as slow.
REPEATED_GROUP = re.compile(r"\)[*+{]|\\[1-9]|\(\?P[=>]")


def matches(module: str, pattern: str) -> bool:
    """Whether a layer's name matches a pattern.

    Raises:
        RecipeError: the pattern is no regular expression, or one that may take very long here.
    """
    if pattern.startswith(REGEX):
        if len(module) > MAX_NAME_LENGTH:
            raise RecipeError(f"the name {module[:40]}... is too long for the pattern {pattern!r}")
        return _compile(pattern).match(module) is not None
    return fnmatchcase(module, pattern)


def require_valid(pattern: str) -> None:
    """Raise RecipeError where a pattern cannot be matched."""
    if len(pattern) > MAX_PATTERN_LENGTH:
        raise RecipeError(
            f"the pattern {pattern[:40]!r}... has {len(pattern)} characters; at most "
            f"{MAX_PATTERN_LENGTH} are taken"
        )
    if pattern.startswith(REGEX):
        _compile(pattern)


@functools.cache
def _compile(pattern: str) -> re.Pattern[str]:
    regex = pattern.removeprefix(REGEX)
    is_slow = REPEATED_GROUP.search(regex) or len(REPETITION.findall(regex)) > MAX_REPETITIONS
    if len(pattern) > MAX_PATTERN_LENGTH or is_slow:
        raise RecipeError(
            f"the pattern {pattern[:40]!r} may take very long: it should repeat no group, and at "
            f"most {MAX_REPETITIONS} characters; a shell's pattern is like '*.down_proj'"
        )
    try:
        return re.compile(regex)
    except (re.error, OverflowError, RecursionError) as e:
        raise RecipeError(f"the pattern {pattern!r} is no regular expression ({e})") from None
