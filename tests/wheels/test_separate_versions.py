"""Packages built as wheels are installed, listed and upgraded each by itself: `tox run -e
wheels`.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = sorted((ROOT / "packages").iterdir())


def project(package: Path) -> dict:
    return tomllib.loads((package / "pyproject.toml").read_text())["project"]


SCHEMES = {
    name
    for package in PACKAGES
    for name in project(package)["entry-points"].get("bitpress.schemes", ())
}


def wheels(packages: list[Path], into: Path) -> list[Path]:
    """The packages built, each in an environment of its own, as a release builds them."""
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "--wheel-dir",
            into,
            *packages,
        ],
        check=True,
    )
    return sorted(into.glob("*.whl"))


class Environment:
    """A virtual environment that holds nothing but what is installed into it."""

    def __init__(self, home: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
        self.home = home
        (self.site,) = home.glob("lib/*/site-packages")

    def pip(self, *words: str | Path) -> None:
        """Run this Python's pip on the environment."""
        pip = [sys.executable, "-m", "pip", "--python", self.home / "bin/python"]
        subprocess.run([*pip, *words], check=True)

    def install(self, *what: Path) -> None:
        self.pip("install", "--quiet", *what)

    def schemes(self) -> dict[str, tuple[str, str]]:
        """Package and version of each scheme that the installed command lists."""
        done = subprocess.run(
            [self.home / "bin/bitpress", "schemes", "--json"],
            check=True,
            capture_output=True,
            text=True,
        )
        document = json.loads(done.stdout)
        assert document["problems"] == []
        return {
            scheme["name"]: (scheme["package"], scheme["version"]) for scheme in document["schemes"]
        }

    def files(self, package: str) -> dict[str, bytes]:
        """What of a package is installed."""
        (info,) = self.site.glob(f"{package.replace('-', '_')}-*.dist-info")
        files = importlib.metadata.Distribution.at(info).files or ()
        return {str(file): file.read_binary() for file in files if file.suffix != ".pyc"}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The wheel of every package here."""
    wheel_files = wheels(PACKAGES, tmp_path_factory.mktemp("dist"))
    return {wheel.name.split("-")[0].replace("_", "-"): wheel for wheel in wheel_files}


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """A clean environment that sees just what the core declares that it requires: to install torch
    anew takes half a minute.
    """
    install = runpy.run_path(str(ROOT / "tools/install.py"))
    result = Environment(tmp_path_factory.mktemp("clean") / "env")
    install["see"](result.site, install["core_layer"]())
    return result


def test_every_package_builds_a_wheel_of_its_own_version(built: dict[str, Path]) -> None:
    names = {project(package)["name"]: project(package)["version"] for package in PACKAGES}
    assert {name: wheel.name.split("-")[1] for name, wheel in built.items()} == names


def test_the_core_and_one_scheme_give_exactly_that_scheme(
    built: dict[str, Path], environment: Environment
) -> None:
    environment.install(built["bitpress-core"], built["bitpress-scheme-nvfp4"])
    (version,) = {
        project(package)["version"]
        for package in PACKAGES
        if project(package)["name"] == "bitpress-scheme-nvfp4"
    }
    assert environment.schemes() == {"nvfp4": ("bitpress-scheme-nvfp4", version)}
    installed = {path.name.split("-")[0] for path in environment.site.glob("bitpress*.dist-info")}
    assert installed == {"bitpress_core", "bitpress_scheme_nvfp4"}


def test_a_scheme_written_and_installed_with_pip_joins_it(
    environment: Environment, tmp_path: Path
) -> None:
    subprocess.run(
        [environment.home / "bin/bitpress", "new-scheme", "my-own"], cwd=tmp_path, check=True
    )
    environment.install(tmp_path / "bitpress-scheme-my-own")
    assert set(environment.schemes()) == {"nvfp4", "my-own"}
    environment.pip("uninstall", "-qy", "bitpress-scheme-my-own")


def test_upgrading_one_scheme_leaves_the_others_and_the_core_untouched(
    built: dict[str, Path], environment: Environment, tmp_path: Path
) -> None:
    environment.install(*built.values())
    before = environment.schemes()
    assert set(before) == SCHEMES
    files = {name: environment.files(name) for name in built}
    source = shutil.copytree(ROOT / "packages/scheme-nvfp4", tmp_path / "source")
    table = (source / "pyproject.toml").read_text()
    (source / "pyproject.toml").write_text(
        re.sub(r'^version = ".*"$', 'version = "0.99.0"', table, flags=re.MULTILINE)
    )
    environment.install(*wheels([source], tmp_path / "dist"))
    assert environment.schemes() == before | {"nvfp4": ("bitpress-scheme-nvfp4", "0.99.0")}
    for name in built:
        assert files[name], name
        assert (environment.files(name) == files[name]) == (name != "bitpress-scheme-nvfp4"), name
