"""Run each scheme through the conformance kit of the oldest core that its package allows, and the
tests of source formats with theirs (tox run -e oldest).

The released cores are this repository's tags `core-vX.Y.Z`. Where none that a package allows is
older than today's core, there is nothing to run that `tox run -e scheme-NAME` does not run.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]

# Groups of entry points.
SCHEMES, SOURCES = "bitpress.schemes", "bitpress.sources"


def released() -> list[Version]:
    """The versions of the core that have a tag, oldest first; none outside a git checkout."""
    if not (ROOT / ".git").exists():
        print("no git checkout: released cores are unknown")
        return []
    words = ["git", "-C", str(ROOT), "tag", "--list", "core-v*"]
    tags = subprocess.run(words, check=True, capture_output=True, text=True).stdout.split()
    return sorted(Version(tag.removeprefix("core-v")) for tag in tags)


def project(package: Path) -> dict[str, Any]:
    """The table `project` of a package's pyproject.toml."""
    table: dict[str, Any] = tomllib.loads((package / "pyproject.toml").read_text())["project"]
    return table


def plugins(table: Mapping[str, Any], group: str) -> list[str]:
    """The entry points of a group that a package provides."""
    return list(table.get("entry-points", {}).get(group, ()))


def install(package: Path, core: Version) -> None:
    """Install a package beside a released core."""
    with tempfile.TemporaryDirectory() as folder:
        archive = ["archive", f"--output={folder}/core.zip", f"core-v{core}", "packages/core"]
        subprocess.run(["git", "-C", str(ROOT), *archive], check=True)
        shutil.unpack_archive(f"{folder}/core.zip", folder)
        pip = [sys.executable, "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, f"{folder}/packages/core[conformance]", str(package)], check=True)


def try_out(package: Path, table: Mapping[str, Any]) -> None:
    """Run the kit for each scheme of a package; source formats have no kit, but tests."""
    pytest = [sys.executable, "-m", "pytest", "-q"]
    for scheme in plugins(table, SCHEMES):
        kit = ["--pyargs", "bitpress.conformance", "--scheme", scheme]
        subprocess.run([*pytest, *kit], check=True)
    if plugins(table, SOURCES):
        subprocess.run([*pytest, str(package / "tests")], check=True)


def main() -> None:
    """Install and try one package after the other."""
    today, cores = Version(project(ROOT / "packages/core")["version"]), released()
    for package in sorted(file.parent for file in (ROOT / "packages").glob("*/pyproject.toml")):
        table = project(package)
        if not plugins(table, SCHEMES) and not plugins(table, SOURCES):
            continue
        (expected,) = [
            r for r in map(Requirement, table["dependencies"]) if r.name == "bitpress-core"
        ]
        oldest = next(
            (version for version in cores if version in expected.specifier and version < today),
            None,
        )
        if oldest is None:
            print(
                f"{package.name}: no released core that bitpress-core{expected.specifier} allows "
                f"is older than today's, {today}"
            )
            continue
        print(f"{package.name}: bitpress-core {oldest}", flush=True)
        install(package, oldest)
        try_out(package, table)


if __name__ == "__main__":
    main()
