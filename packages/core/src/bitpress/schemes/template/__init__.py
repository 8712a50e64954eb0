"""A package with a scheme of its own, to start from: what `bitpress new-scheme` writes."""

from __future__ import annotations

import re
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from string import Template

from bitpress.errors import OutputError, RecipeError
from bitpress.schemes.hookspecs import VERSION
from bitpress.schemes.registry import discover


def write(name: str, where: Path) -> Path:
    """The folder `bitpress-scheme-NAME`, made in `where`: a scheme that keeps every law as it
    stands.

    Raises:
        RecipeError: the name is no name for a scheme, or another package's scheme has it.
        OutputError: the folder is there already.
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        raise RecipeError(
            f"{name!r} is no name for a scheme: small letters, digits and single dashes are, such "
            "as my-int4"
        )
    taken = {scheme.name: scheme.package for scheme in discover().schemes.values()}
    if name in taken:
        raise RecipeError(f"{name} is a scheme of {taken[name]}: take another name")
    folder = where / f"bitpress-scheme-{name}"
    if folder.exists():
        raise OutputError(f"{folder} is there already: move it away, or take another name")
    values = {"name": name, "module": module(name), "hooks": VERSION}
    for path, text in _files(resources.files("bitpress.schemes.template").joinpath("package")):
        file = folder / Template(path).substitute(values)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(Template(text).substitute(values), encoding="utf-8")
    return folder


def module(name: str) -> str:
    """The module of a scheme: `bitpress_my_int4` of `my-int4`."""
    return f"bitpress_{name.replace('-', '_')}"


def _files(folder: Traversable, above: str = "") -> list[tuple[str, str]]:
    """Every file of the template: its path, and its text."""
    found: list[tuple[str, str]] = []
    for item in sorted(folder.iterdir(), key=lambda item: item.name):
        path = f"{above}{item.name}"
        found += (
            _files(item, f"{path}/")
            if item.is_dir()
            else [(path.removesuffix(".in"), item.read_text(encoding="utf-8"))]
        )
    return found
