"""What a shell is given when somebody presses tab."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def ask_for(instruction: str, toy: Path, line: str = "") -> str:
    """What the command answers to a shell."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(toy),
        "_BITPRESS_COMPLETE": instruction,
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(line.split(" ")) - 1),
    }
    done = subprocess.run(
        [sys.executable, "-m", "bitpress"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    return done.stdout


@pytest.mark.parametrize(
    ("line", "completions"),
    [
        ("bitpress comp", ["plain,compress"]),
        ("bitpress plan model --sch", ["plain,--scheme"]),
        ("bitpress plan model --scheme T", ["plain,toy"]),
        ("bitpress plan model --scheme toy+t", ["plain,toy+toy"]),
        ("bitpress plan model --scheme toy --set ", ["plain,levels=", "plain,multiple="]),
        ("bitpress schemes t", ["plain,toy"]),
        ("bitpress schemes toy --serve-on h1", ["plain,H100"]),
        ("bitpress plan model --ser", ["plain,--serve-on"]),
        ("bitpress plan model --hard", [""]),
        ("bitpress compress model out --device a", ["plain,auto"]),
        ("bitpress search model --schemes ", ["plain,toy", "plain,none"]),
        ("bitpress search model --schemes none,T", ["plain,none,toy"]),
        ("bitpress search model --schemes toy+", ["plain,toy+toy"]),
        ("bitpress search model --schemes none,toy:l", ["plain,none,toy:levels="]),
        ("bitpress plan mod", ["file,mod"]),
        ("bitpress compress model ou", ["file,ou"]),
    ],
)
def test_names_options_and_files_are_completed(
    toy: Path, line: str, completions: list[str]
) -> None:
    assert ask_for("bash_complete", toy, line).splitlines() == completions


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_a_shell_is_given_its_script(toy: Path, shell: str) -> None:
    assert f"_BITPRESS_COMPLETE={shell}_complete" in ask_for(f"{shell}_source", toy)
