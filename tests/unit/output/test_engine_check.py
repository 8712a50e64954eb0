"""What an installed vLLM says of an output becomes faults, or one line on why it says nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from fixtures.toy_scheme import install_toy

from bitpress import BitpressError
from bitpress.conformance.commands import command, refusal
from bitpress.conformance.models import write_model
from bitpress.output.engine_check import find_engine_faults


def interpreter(folder: Path, script: str) -> str:
    """A stand-in for a Python with vLLM."""
    file = folder / "python"
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    return str(file)


def test_every_text_of_the_engine_is_a_fault(tmp_path: Path) -> None:
    script = """echo noise; echo "[\\"vLLM: no tensor of the files fills a\\", \\"$4\\"]" """
    faults = find_engine_faults(tmp_path, interpreter(tmp_path, script))
    assert [str(f) for f in faults] == ["vLLM: no tensor of the files fills a", str(tmp_path)]


def test_an_engine_without_complaints_gives_no_fault(tmp_path: Path) -> None:
    assert not find_engine_faults(tmp_path, interpreter(tmp_path, "echo '[]'"))


def test_the_engine_is_told_what_it_needs_without_a_network(tmp_path: Path) -> None:
    script = """echo "[\\"$VLLM_LOGGING_LEVEL $HF_HUB_OFFLINE\\"]" """
    (fault,) = find_engine_faults(tmp_path, interpreter(tmp_path, script))
    assert str(fault) == "CRITICAL 1"


def test_an_engine_that_dies_is_named_with_its_last_line(tmp_path: Path) -> None:
    python = interpreter(tmp_path, "echo first >&2; echo 'no kernel' >&2; exit 3")
    with pytest.raises(BitpressError, match="exit code 3 before it answered: no kernel"):
        find_engine_faults(tmp_path, python)


@pytest.mark.parametrize("script", [":", "echo 'a last word'"], ids=["nothing", "no list"])
def test_an_engine_that_ends_without_an_answer_is_named(tmp_path: Path, script: str) -> None:
    python = interpreter(tmp_path, script)
    with pytest.raises(BitpressError, match="exit code 0 before it answered: no message"):
        find_engine_faults(tmp_path, python)


def test_without_vllm_the_option_says_how_to_get_it(tmp_path: Path) -> None:
    toy = install_toy(tmp_path / "plugins")
    model = write_model(tmp_path / "model")
    assert command("compress", model, tmp_path / "out", "--scheme", "toy", path=toy).returncode == 0
    line = refusal("verify", tmp_path / "out", "--engine", path=toy)
    assert "pip install vllm" in line
