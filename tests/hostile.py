"""What strangers may write: names, numbers and JSON values made to confuse; and the law that such
input is refused clearly.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings, strategies as st

from bitpress import BitpressError

# seconds for one input, on a busy machine; none needs a tenth
PATIENCE = 5.0
NAMES = st.sampled_from(
    [
        "a",
        "b",
        "",
        "__metadata__",
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.²." + "x.weight",
        "../../x",
        "/etc/passwd",
        "\ud800",
        "\x1b[31m",
        "\0",
        "[red]",
        "model.layers." + "9" * 5000 + ".x.weight",
        ".1" * 400 + ".weight",
    ]
)
NUMBERS = st.one_of(
    st.integers(-2, 100),
    st.sampled_from([2**31, 2**63, 2**64, 10**30, 10**400, 1.5, True, float("nan"), float("inf")]),
)
LEAVES = st.one_of(
    st.none(), NUMBERS, NAMES, st.sampled_from(["F32", "BF16", "F4", "U8", "BF17", "gptq", "llama"])
)
JSON = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=8,
)


def amounts(quick: int, whole: int) -> pytest.MarkDecorator:
    """How many inputs are tried: few by default, many behind the marker."""
    return pytest.mark.parametrize("count", [quick, pytest.param(whole, marks=pytest.mark.long)])


def tried(count: int) -> Any:
    """Settings of so many examples, the same ones every time."""
    slow = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
    return settings(
        max_examples=count,
        derandomize=True,
        deadline=None,
        suppress_health_check=slow,
        database=None,
    )


@contextlib.contextmanager
def only_clear_errors() -> Iterator[None]:
    """What cannot be read is a BitpressError of one short line, and soon."""
    began = time.monotonic()
    try:
        yield
    except BitpressError as e:
        told = str(e)
    else:
        told = ""
    assert len(told) < 3000
    assert time.monotonic() - began < PATIENCE
