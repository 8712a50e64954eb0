"""The documentation says what the code says, and its code runs."""

from __future__ import annotations

import functools
import os
import re
import runpy
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fixtures.forked_shell import command_for_shells

from bitpress.schemes.registry import discover

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
Walk = Callable[[str], str]
BLOCK = re.compile(r'^```(\w*)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)


@functools.cache
def generated() -> dict[str, str]:
    """The pages that tools/pages.py would write now."""
    return dict(runpy.run_path(str(ROOT / "tools/pages.py"))["pages"]())


@pytest.mark.parametrize("page", ["commands.md", "hooks.md", "schemes.md"])
def test_generated_pages_are_what_the_code_says_now(page: str) -> None:
    assert (DOCS / "reference" / page).read_text() == generated()[page], (
        "stale: tox run -e pages writes them"
    )
    assert set(generated()) == {"commands.md", "hooks.md", "schemes.md"}


def test_the_page_for_choosing_names_every_scheme() -> None:
    page = (DOCS / "choosing-a-scheme.md").read_text()
    assert not [name for name in discover().schemes if f"`{name}" not in page]


# every command that a page shows
COMMANDS = [
    (page.name, *match)
    for page in sorted(DOCS.glob("*.md"))
    for code in re.findall(
        r"^```(?:sh)?\n.*?^```|`[^`\n]+`", page.read_text(), re.MULTILINE | re.DOTALL
    )
    for match in re.findall(r"(?:^|`)bitpress ([a-z-]+)([^`\n]*)", code, re.MULTILINE)
]


@pytest.mark.parametrize(("page", "command", "arguments"), COMMANDS)
def test_commands_that_pages_show_exist_with_their_options(
    page: str, command: str, arguments: str
) -> None:
    sections = dict(
        re.findall(
            r"^## ([\w-]+)\n(.*?)(?=^## |\Z)", generated()["commands.md"], re.MULTILINE | re.DOTALL
        )
    )
    if command.startswith("-"):
        sections[command] = f"`{command}`" if f"`{command}`" in generated()["commands.md"] else ""
    assert sections.get(command), f"{page}: bitpress {command}"
    for option in re.findall(r"--[\w-]+", arguments):
        assert f"`{option}`" in sections[command], f"{page}: bitpress {command} {option}"


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """An environment of its own that sees what is installed here: what a page installs into it is
    gone afterwards.
    """
    home = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    (site,) = home.glob("lib/*/site-packages")
    (site / "outer.pth").write_text(
        f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
    )
    script = home / "bin/pytest"
    script.write_text(f'#!/bin/sh\nexec {home}/bin/python -m pytest "$@"\n')
    script.chmod(0o755)
    # 0 is read as: no isolation
    here = {
        "PIP_NO_INDEX": "1",
        "PIP_NO_DEPS": "1",
        "PIP_NO_BUILD_ISOLATION": "0",
        "PIP_QUIET": "1",
    }
    path = os.pathsep.join([str(home / "bin"), os.environ["PATH"]])
    with command_for_shells(home):
        yield {
            **os.environ,
            **here,
            "PATH": path,
            "MODEL": str(ROOT / "examples/tiny-llama"),
            "HF_HUB_OFFLINE": "1",
        }


def script(page: str) -> Iterator[str]:
    """A page as a shell script: blocks with a title are files, other blocks of `sh` and `python`
    are run, all others are not.
    """
    for language, title, code in BLOCK.findall((DOCS / page).read_text()):
        if title:
            yield (
                f"mkdir -p \"$(dirname '{title}')\"\ncat > '{title}' <<'END OF FILE'\n{code}END OF "
                "FILE"
            )
        elif language == "python":
            yield f"python - <<'END OF CODE'\n{code}END OF CODE"
        elif language == "sh":
            yield code.rstrip()


@pytest.fixture
def walk(environment: dict[str, str], tmp_path: Path) -> Walk:
    """A page walked through by a reader in an empty folder beside the examples; gives what it
    printed.
    """
    (tmp_path / "examples").symlink_to(ROOT / "examples")

    def run(page: str) -> str:
        lines = "\n".join(["set -eu", *script(page)])
        words = ["sh", "-c", lines]
        done = subprocess.run(
            words,
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    return run


# What the README shows of commands, but for lines of time and memory, which depend on the machine,
# and for the figures of `eval`, which depend on the CPU.
MACHINE_LINES = ("time ", "memory ", "effort ")


def test_the_readme_shows_what_commands_print(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    text = (ROOT / "README.md").read_text()
    shown = "".join(code for _, _, code in BLOCK.findall(text) if code.startswith("$ "))
    checked = 0
    for command, output in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", shown, re.MULTILINE):
        if command.startswith("bitpress eval "):
            continue
        done = subprocess.run(
            ["sh", "-c", command],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        expected, printed = (
            [line.rstrip() for line in lines.strip().splitlines()]
            for lines in (output, done.stdout)
        )
        assert [line for line in printed if not line.startswith(MACHINE_LINES)] == [
            line for line in expected if not line.startswith(MACHINE_LINES)
        ]
        checked += 1
    assert checked == 3


def test_the_walk_through_of_a_scheme_of_one_s_own_runs(walk: Walk, tmp_path: Path) -> None:
    printed = walk("writing-a-scheme.md")
    # as it was written, and as it was edited
    assert len(re.findall(r" \d+ passed, \d+ skipped in ", printed)) == 2
    assert "ternary (bitpress-scheme-ternary 0.1.0): Integers from -levels to levels" in printed
    assert "ternary (bitpress-scheme-ternary 0.1.0): Weights of -1, 0 and 1" in printed
    assert "verified: 42 layers read back and compared with the source" in printed
    assert "with bitpress-scheme-ternary 0.1.0" in printed
    assert (tmp_path / "bitpress-scheme-ternary/ternary-model/config.json").is_file()


def test_the_tracer_prints_each_hook_call_with_shapes_and_milliseconds(walk: Walk) -> None:
    printed = walk("extensions.md")
    for hook in ("quantize", "pack", "serialize"):
        assert re.search(
            rf"^{hook} +model\.layers\.0\.\S.* \(\d+, \d+\) \d+\.\d\d ms$", printed, re.MULTILINE
        ), hook
    for hook in ("dequantize", "error_bound"):
        assert re.search(rf"^{hook} +stored \(\d+, \d+\) \d+\.\d\d ms$", printed, re.MULTILINE), (
            hook
        )
    assert "verified: 42 layers" in printed


@pytest.mark.parametrize(
    ("page", "words"),
    [
        (
            "first-compression.md",
            ["verified: 42 layers", "nothing wrong (42 layers compared", "\n()\n"],
        ),
        (
            "python.md",
            ["a list of texts ()", "INFO:bitpress:evaluating: block 6/6", "KL 0.00", "\n()\n"],
        ),
        ("recipes.md", ["36 layers compressed", "verified: 42 layers", "searched.toml: written"]),
    ],
)
def test_a_page_s_commands_run_as_they_are_printed(walk: Walk, page: str, words: list[str]) -> None:
    printed = walk(page)
    for word in words:
        assert word in printed
