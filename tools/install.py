"""Install into one of tox's environments, and share what all of them need.

    python -I tools/install.py [PIP'S OPTIONS] [-e] PACKAGE...

Third-party packages of the core are installed once, into layers beside the environments, which
see them through a path file: torch alone is 700 MB, and took half a minute for each environment.
The packages of this repository are built here, by one build backend: pip makes an environment for
each build, which took four seconds for each package.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGES = ROOT / "packages"
# Beside the environment that runs this: .tox/shared.
SHARED = Path(sys.prefix).parent / "shared" / str(sys.implementation.cache_tag)
# The build backend runs in a process of its own: the environment under test does not see it.
BUILD = "import sys, hatchling.build as b; print(getattr(b, sys.argv[1])(sys.argv[2]))"


def pip(python: Path, *words: str) -> None:
    """Install with this environment's pip into that of another Python."""
    target = ["--python", str(python)] if python != Path(sys.executable) else []
    subprocess.run([sys.executable, "-I", "-m", "pip", *target, "install", *words], check=True)


def site_packages(home: Path) -> Path:
    """Where a virtual environment keeps its packages."""
    (result,) = home.glob("lib/python*/site-packages")
    return result


def layer(name: str, requirements: list[str], *below: Path) -> Path:
    """An environment that holds requirements, made where there is none that holds just these.

    Args:
        below: layers whose packages it sees, and so need not hold.
    """
    home = SHARED / name
    mark, constraints = home / "holds.json", os.environ.get("PIP_CONSTRAINT")
    held = json.dumps([requirements, constraints and Path(constraints).read_text()])
    if mark.exists() and mark.read_text() == held:
        return home
    shutil.rmtree(home, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    see(site_packages(home), *below)
    pip(home / "bin/python", "--no-compile", *requirements)
    mark.write_text(held)
    return home


def see(site: Path, *layers: Path) -> None:
    """Let an environment find the packages of layers, after its own."""
    (site / "shared.pth").write_text("".join(f"{site_packages(one)}\n" for one in layers))


def is_ours(word: str) -> bool:
    """Whether a word names a package of this repository; extras may follow in brackets."""
    return (ROOT / word.partition("[")[0]).resolve().parent == PACKAGES


def built(package: Path, how: str, into: Path, backend: Path) -> Path:
    """A package of this repository as a wheel, whole or editable."""
    words = [str(backend / "bin/python"), "-c", BUILD, f"build_{how}", str(into)]
    done = subprocess.run(words, cwd=package, check=True, stdout=subprocess.PIPE, text=True)
    return into / done.stdout.split()[-1]


@contextlib.contextmanager
def locked_layers() -> Iterator[None]:
    """Two environments may be made at a time: one of them makes the layers for both."""
    SHARED.mkdir(parents=True, exist_ok=True)
    with (SHARED / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def core_project() -> dict[str, Any]:
    """What the core says of itself."""
    text = (PACKAGES / "core/pyproject.toml").read_text()
    return dict(tomllib.loads(text)["project"])


def core_layer() -> Path:
    """What the core requires, for an environment that is made elsewhere."""
    with locked_layers():
        return layer("core", core_project()["dependencies"])


def build_and_layer(words: list[str], folder: Path) -> tuple[list[str], list[Path]]:
    """The words with wheels in place of packages of this repository, and the layers of what those
    require.
    """
    core, layers, arguments, how = core_project(), list[Path](), list[str](), "wheel"
    for word in words:
        path, bracket, extras = word.partition("[")
        if word == "-e":
            how = "editable"
        elif is_ours(word):
            backend = layer("build", ["hatchling", "editables"])
            wheel = built((ROOT / path).resolve(), how, folder, backend)
            arguments.append(f"{wheel}{bracket}{extras}")
            layers = layers or [layer("core", core["dependencies"])]
            if "conformance" in extras:
                extra = core["optional-dependencies"]["conformance"]
                layers.append(layer("tests", extra, *layers))
            how = "wheel"
        else:
            arguments.append(word)
    return arguments, layers


def main(words: list[str]) -> None:
    """Install what pip would have installed with these words."""
    needs_layers = any(is_ours(word) for word in words)
    with tempfile.TemporaryDirectory() as folder:
        with locked_layers() if needs_layers else contextlib.nullcontext():
            arguments, layers = build_and_layer(words, Path(folder))
            see(Path(sysconfig.get_path("purelib")), *layers)
        pip(Path(sys.executable), *arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
