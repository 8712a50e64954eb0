"""The package of a new scheme, to start from: what `bitpress new-scheme` writes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from string import Template

from bitpress.errors import OutputError, RecipeError
from bitpress.schemes.hookspecs import VERSION
from bitpress.schemes.registry import discover


def write_package(name: str, parent: Path) -> Path:
    """Write the package of a new scheme, which keeps every law as it stands.

    Args:
        name: of the scheme.
        parent: the folder to write into.

    Returns:
        The new folder, `bitpress-scheme-NAME`.

    Raises:
        RecipeError: the name is no name for a scheme, or another package's scheme has it.
        OutputError: the folder exists already.
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        raise RecipeError(
            f"{name!r} is no name for a scheme: small letters, digits and single dashes are, such "
            "as my-int4"
        )
    schemes = discover().schemes
    if name in schemes:
        raise RecipeError(f"{name} is a scheme of {schemes[name].package}: take another name")
    folder = parent / f"bitpress-scheme-{name}"
    if folder.exists():
        raise OutputError(f"{folder} is there already: move it away, or take another name")
    values = {"name": name, "module": module_name(name), "hooks": VERSION}
    package = resources.files("bitpress.schemes.template").joinpath("package")
    for path, text in _read_files(package):
        file = folder / Template(path).substitute(values)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(Template(text).substitute(values), encoding="utf-8")
    return folder


def module_name(name: str) -> str:
    """The module of a scheme: `bitpress_my_int4` of `my-int4`."""
    return f"bitpress_{name.replace('-', '_')}"


def _read_files(folder: Traversable, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every file of the template: its path, and its text."""
    for item in sorted(folder.iterdir(), key=lambda item: item.name):
        path = prefix + item.name
        if item.is_dir():
            yield from _read_files(item, f"{path}/")
        else:
            # The suffix keeps tools from taking templates for Python or TOML.
            yield path.removesuffix(".in"), item.read_text(encoding="utf-8")
