"""The shape of the code: who may import whom, and what nobody may know."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CORE = ROOT / "packages/core/src/bitpress"
SCHEMES = sorted((ROOT / "packages").glob("scheme-*"))
TABLES = [tomllib.loads((package / "pyproject.toml").read_text())["project"] for package in SCHEMES]
SCHEME_NAMES = [name for table in TABLES for name in table["entry-points"]["bitpress.schemes"]]

# What each part of core may import of the others; a part not named here may import everything below
# `run`.
VALUES = {"errors", "layer"}
ALLOWED = {
    "errors": set(),
    "layer": set(),
    "progress": set(),
    "typed": set(),
    "compute": {"errors"},
    "options": VALUES,
    "hardware": VALUES,
    "numerics": VALUES | {"numerics"},
    "hookspecs": VALUES | {"hardware", "options"},
    "compatibility": VALUES | {"hookspecs"},
    "schemes": VALUES | {"compatibility", "hookspecs", "options"},
    "checkpoint": VALUES | {"checkpoint"},
    "recipe": VALUES | {"schemes"},
    "stacks": VALUES | {"checkpoint"},
    "quantization": VALUES,
    "dequantised": VALUES | {"checkpoint", "quantization"},
    "fused": VALUES | {"checkpoint", "quantization", "stacks"},
    "source": VALUES | {"checkpoint", "dequantised", "fused", "quantization"},
    "engine_rules": VALUES | {"checkpoint", "quantization", "stacks"},
    "ranks": VALUES,
    "launch": {"errors", "ranks"},
    "manifest": VALUES | {"checkpoint", "ranks", "typed"},
    "card": {"manifest"},
    "borders": VALUES | {"schemes"},
    "chain": VALUES | {"borders", "schemes"},
    "rounding": VALUES | {"borders", "schemes"},
    "shards": VALUES | {"chain", "checkpoint", "schemes", "stacks"},
}
BELOW_RUN = set(ALLOWED) | {
    "planning",
    "stream",
    "verification",
    "decompression",
    "calibrate",
    "served",
    "evaluate",
    "checking",
    "serving",
    "job",
}


def part(file: Path) -> str:
    """The first name below the package: a module or a folder."""
    return file.relative_to(CORE).parts[0].removesuffix(".py")


def imports(file: Path, package: str, typing_too: bool = False) -> Iterator[str]:
    """Full names of the modules of `package` that a file imports, inside functions too."""
    tree = ast.parse(file.read_text())
    hidden = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If)
        and ast.unparse(block.test) == "TYPE_CHECKING"
        and not typing_too
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if node in hidden:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == package)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == package:
            for alias in node.names:
                below = CORE.parent / node.module.replace(".", "/") / alias.name
                module = below.is_dir() or below.with_suffix(".py").is_file()
                yield f"{node.module}.{alias.name}" if module else node.module


FILES = sorted(CORE.rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(CORE)))
def test_core_imports_along_the_arrows_only(file: Path) -> None:
    found = {
        name.split(".")[1] for name in imports(file, "bitpress", typing_too=True) if "." in name
    }
    me = part(file)
    # the ends of the line
    if me in ("run", "outputs", "cli", "conformance", "newscheme", "__init__", "__main__"):
        return
    assert found - {me} <= ALLOWED.get(me, BELOW_RUN), f"{me} must not import these"


def test_modules_of_core_import_one_another_in_one_direction() -> None:
    names = {
        file: ".".join(file.relative_to(CORE.parent).with_suffix("").parts).removesuffix(
            ".__init__"
        )
        for file in FILES
    }
    graph = {
        name: set(imports(file, "bitpress")) - {name, "bitpress"}
        for file, name in names.items()
        if name != "bitpress"
    }
    # raises CycleError where there is a knot
    assert len(list(TopologicalSorter(graph).static_order())) >= len(graph)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(CORE)))
def test_core_never_names_a_scheme_nor_imports_one(file: Path) -> None:
    tree = ast.parse(file.read_text())
    # docstrings may give examples
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            mentioned = [
                name
                for name in SCHEME_NAMES
                if re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", node.value)
            ]
            assert not mentioned, f"line {node.lineno} names {mentioned}"
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            assert not any(module.startswith("bitpress_") for module in modules)


@pytest.mark.parametrize("package", SCHEMES, ids=lambda package: package.name)
def test_a_scheme_imports_only_the_public_names_of_core(package: Path) -> None:
    for file in package.rglob("*.py"):
        own = file.relative_to(package / "src").parts[0]
        assert set(imports(file, "bitpress", typing_too=True)) <= {"bitpress", "bitpress.numerics"}
        others = [other for other in SCHEMES if other != package]
        for other in others:
            assert not list(
                imports(file, "bitpress_" + other.name.removeprefix("scheme-"), typing_too=True)
            ), own


def test_only_the_loops_that_run_the_model_know_transformers() -> None:
    users = {part(file) for file in FILES if any(imports_any(file, "transformers"))}
    assert users <= {"calibrate", "evaluate"}


def imports_any(file: Path, package: str) -> Iterator[bool]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield any(alias.name.split(".")[0] == package for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").split(".")[0] == package


@pytest.mark.parametrize(
    "file", sorted((ROOT / "packages").rglob("*.py")), ids=lambda file: file.name
)
def test_a_module_is_not_longer_than_400_lines(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= 410


@pytest.mark.parametrize("name", ["os.environ", "os.getenv"])
def test_no_environment_variable_is_configuration(name: str) -> None:
    assert not [file for file in (ROOT / "packages").rglob("*.py") if name in file.read_text()]


def test_installed_schemes_are_those_of_the_packages() -> None:
    installed = {entry.name for entry in importlib.metadata.entry_points(group="bitpress.schemes")}
    assert installed == set(SCHEME_NAMES)
