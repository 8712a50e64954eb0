"""An expression of a foreign config is matched only if no name can make it take long."""

from __future__ import annotations

import re
import time

import pytest

from bitpress.checkpoint.engine_facts import MAX_NAME_LENGTH
from bitpress.planning.config_rules import explain_expression

# As published models and we ourselves write them.
PUBLISHED = (
    ".*lm_head.*",
    ".*self_attn.*",
    r".*mlp\.(gate|up|gate_up|down)_proj.*",
    ".*mlp.gate$",
    r"model\.layers\.\d+\.mlp\.experts\.\d+\.w1$",
    r"model\.layers\.\d+\.shared_transformer\.adapters\.\d+\.\d+$",
    r".*\.3\.mlp\.experts(\..+)?$",
    r"(.*\.)?visual\..*",
    r"(?:vision|audio)_tower.*",
)

HOSTILE = (
    ".*.*.*.*.*.*x",
    ".*a.*a.*a.*a",
    "(a+)+x",
    "(a|a)" * 30 + "x",
    "a?" * 30 + "a" * 30 + "x",
    r"(.*)\1x",
    "(?P<n>.*)(?P=n)x",
    "(?=.*x).*",
    "(.{0,900}){9}x",
    "[a]*[a]*[^]]*[a]*x",
)

# The worst that are taken.
SLOWEST = (
    "(?:a|a|a|a|a|a|a).*a.*a.*ax",
    "(a|a|a|a)(a|a|a|a|a|a|a|a)(a|a|a|a|a|a|a|a).*a.*ax",
    "a?" * 8 + ".*a.*ax",
)


@pytest.mark.parametrize("pattern", PUBLISHED)
def test_an_expression_that_models_are_published_with_is_taken(pattern: str) -> None:
    assert explain_expression(pattern) is None


@pytest.mark.parametrize("pattern", HOSTILE)
def test_an_expression_that_may_take_long_is_refused(pattern: str) -> None:
    assert explain_expression(pattern) == "which may take forever to match"


@pytest.mark.parametrize("pattern", SLOWEST)
def test_what_is_taken_matches_the_worst_name_in_a_second(pattern: str) -> None:
    assert explain_expression(pattern) is None
    start = time.process_time()
    assert re.match(pattern, "a" * MAX_NAME_LENGTH) is None
    assert time.process_time() - start < 1
