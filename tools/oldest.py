"""Run each scheme through the conformance kit of the oldest core that its package allows (tox run
-e oldest).

The released cores are this repository's tags `core-vX.Y.Z`. Where none that a package allows is
older than today's core, there is nothing to run that `tox run -e scheme-NAME` does not run.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]


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


def main() -> None:
    """Install and try one package after the other."""
    today, cores = Version(project(ROOT / "packages/core")["version"]), released()
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    for package in sorted((ROOT / "packages").glob("scheme-*")):
        table = project(package)
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
        with tempfile.TemporaryDirectory() as folder:
            words = [
                "git",
                "-C",
                str(ROOT),
                "archive",
                f"--output={folder}/core.zip",
                f"core-v{oldest}",
                "packages/core",
            ]
            subprocess.run(words, check=True)
            shutil.unpack_archive(f"{folder}/core.zip", folder)
            subprocess.run([*pip, f"{folder}/packages/core[conformance]", str(package)], check=True)
        for scheme in table["entry-points"]["bitpress.schemes"]:
            kit = ["--pyargs", "bitpress.conformance", "-q", "--scheme", scheme]
            subprocess.run([sys.executable, "-m", "pytest", *kit], check=True)


if __name__ == "__main__":
    main()
