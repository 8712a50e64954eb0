"""Which names of layers a pattern matches."""

from __future__ import annotations

import time

import pytest

from bitpress.errors import RecipeError
from bitpress.planning.layer_pattern import matches, require_valid

LAYER = "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize(
    ("pattern", "is_matched"),
    [
        ("*.down_proj", True),
        ("down_proj", False),
        ("re:.*down_proj$", True),
        # from the start of the name, and not to its end, as compressed-tensors matches
        ("re:model.layers", True),
        ("re:down_proj", False),
        (r"re:.*layers\.\d+\.mlp", True),
        ("re:.*(up|down)_proj$", True),
        ("re:.*q_proj$", False),
    ],
)
def test_a_pattern_is_a_shell_s_or_a_regular_expression(pattern: str, is_matched: bool) -> None:
    assert matches(LAYER, pattern) == is_matched


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("re:(", "is no regular expression"),
        ("re:*", "is no regular expression"),
        ("re:(a+)+$", "may take very long"),
        ("re:.*.*.*.*x", "may take very long"),
        (r"re:(.*)\1", "may take very long"),
        ("*" * 2000, "2000 characters"),
        ("re:" + "a" * 2000, "2003 characters"),
    ],
)
def test_what_cannot_be_matched_in_time_is_refused(pattern: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        require_valid(pattern)


def test_the_slowest_pattern_takes_a_moment_for_the_longest_name() -> None:
    start = time.process_time()
    assert not matches("a" * 300, "re:.*.*.*x")
    assert time.process_time() - start < 2
    with pytest.raises(RecipeError, match="too long"):
        matches("a" * 301, "re:.*")
