"""What is written for people agrees with what the code does."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pluggy
import pytest

from bitpress.conformance import commands
from bitpress.schemes import hookspecs
from bitpress.schemes.registry import discover

ROOT = Path(__file__).parents[2]
PACKAGES = sorted((ROOT / "packages").iterdir())
README = (ROOT / "README.md").read_text()


def project(package: Path) -> dict:
    return tomllib.loads((package / "pyproject.toml").read_text())["project"]


def test_the_readme_lists_the_schemes_that_are_here() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \|.*\| `(bitpress-scheme-[\w-]+)` \|", README, re.MULTILINE)
    assert dict(rows) == {name: scheme.package for name, scheme in discover().schemes.items()}


@pytest.mark.parametrize(
    "command", sorted(set(re.findall(r"^\$ bitpress ([\w-]+)", README, re.MULTILINE)))
)
def test_commands_of_the_readme_exist_with_their_options(command: str) -> None:
    shown = commands.command(command, "--help").stdout
    for line in re.findall(rf"^\$ bitpress {command} (.*)$", README, re.MULTILINE):
        for option in re.findall(r"(--[\w-]+)", line.split("#")[0]):
            assert option in shown, f"{option} in: bitpress {command} {line}"


def test_every_command_of_the_readme_s_table_of_contents_is_in_the_help() -> None:
    shown = commands.command("--help").stdout
    for command in (
        "schemes",
        "plan",
        "compress",
        "search",
        "verify",
        "eval",
        "inspect",
        "report",
        "decompress",
        "new-scheme",
    ):
        assert re.search(rf"^\W*{command}\b", shown, re.MULTILINE)


def test_every_hook_is_specified_with_its_arguments() -> None:
    manager = pluggy.PluginManager("bitpress")
    manager.add_hookspecs(hookspecs)
    for name, caller in vars(manager.hook).items():
        if name.startswith("_"):
            continue
        function = getattr(hookspecs, name)
        assert function.__doc__, name
        assert set(function.__annotations__) == {*caller.spec.argnames, "return"}, (
            f"{name} is not fully typed"
        )


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)
def test_a_package_has_its_own_version_notes_readme_license_and_types(package: Path) -> None:
    table = project(package)
    assert f"## {table['version']}" in (package / "CHANGELOG.md").read_text()
    assert table["name"] in (package / "README.md").read_text()
    assert (package / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    assert list((package / "src").glob("*/py.typed"))


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)
def test_a_package_pins_nothing(package: Path) -> None:
    table = project(package)
    expected = [
        *table["dependencies"],
        *(d for extra in table.get("optional-dependencies", {}).values() for d in extra),
    ]
    # a marker, after the semicolon, may name a system
    versions = [requirement.partition(";")[0] for requirement in expected]
    assert not [version for version in versions if "==" in version]
    assert table["requires-python"] == ">=3.11"


def test_ci_runs_the_readme_s_test_command() -> None:
    command = "python -m pip install tox && tox run-parallel"
    assert f"\n{command}\n" in README
    assert f"\n{command}\n" in (ROOT / ".ci/run").read_text()
