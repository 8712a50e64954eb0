"""Every promise of docs/reliability.md names tests, and they exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/reliability.md").read_text()
# tables of promises: others hold figures
TABLES = re.findall(r"^\| promise \| tests \|\n\|.*\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for table in TABLES
    for line in table.splitlines()
]


@pytest.mark.parametrize(("promise", "tests"), ROWS, ids=[row[0][:60] for row in ROWS])
def test_every_promise_is_held_by_tests_that_exist(promise: str, tests: str) -> None:
    named = re.findall(r"`([\w/.-]+)::(\w+)`", tests)
    assert named, promise
    assert ", ".join(f"`{file}::{test}`" for file, test in named) == tests
    for file, test in named:
        tree = ast.parse((ROOT / file).read_text())
        assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
