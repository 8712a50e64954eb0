"""What docs/models.md says of each architecture is what happens."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
from fixtures.small_model_tables import ARCHITECTURES

ROOT = Path(__file__).parents[2]
QUICK = (
    "DeepseekV3ForCausalLM",
    "GPT2LMHeadModel",
    "Gemma3ForConditionalGeneration",
    "GptOssForCausalLM",
    "GraniteMoeHybridForCausalLM",
    "LlamaForCausalLM",
    "MixtralForCausalLM",
    "Qwen3NextForCausalLM",
)
TOOL: dict[str, Any] = runpy.run_path(str(ROOT / "tools/models.py"))
PAGE = (ROOT / "docs/models.md").read_text(encoding="utf-8")


def test_the_page_has_every_architecture() -> None:
    rows = [line.split("`")[1] for line in PAGE.splitlines() if line.startswith("| `")]
    assert rows == sorted(ARCHITECTURES)
    assert len(rows) >= 80


@pytest.mark.parametrize("architecture", QUICK)
def test_the_page_says_what_happens(architecture: str) -> None:
    rows, refusals = TOOL["lines"]([architecture])
    assert all(line in PAGE.splitlines() for line in rows + refusals), (
        "stale: tox run -e pages writes it"
    )


@pytest.mark.long
def test_the_whole_page_says_what_happens() -> None:
    assert TOOL["BEGIN"] + "\n" + TOOL["written"]() + "\n" + TOOL["END"] in PAGE, (
        "stale: tox run -e pages writes it"
    )
