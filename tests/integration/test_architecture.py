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
MODULES = sorted(CORE.rglob("*.py"))
DATA = sorted(
    file for file in CORE.rglob("*") if file.suffix in (".in", ".toml", ".css", ".md", ".txt")
)
SCHEMES = sorted((ROOT / "packages").glob("scheme-*"))
TABLES = [tomllib.loads((package / "pyproject.toml").read_text())["project"] for package in SCHEMES]
SCHEME_NAMES = [name for table in TABLES for name in table["entry-points"]["bitpress.schemes"]]

# A package of core imports only what stands before it.
LAYERS = (
    "errors",
    "runtime",
    "schemes",
    "numerics",
    "checkpoint",
    "planning",
    "modeling",
    "output",
    "compression",
    "api",
    "cli",
    "conformance",
)
# Libraries that one package of core alone may import.
LIBRARIES = {"transformers": "modeling", "click": "cli", "rich": "cli"}


def package(module: str) -> str:
    """`planning` of `bitpress.planning.recipe`."""
    return module.split(".")[1]


def dotted(file: Path) -> str:
    """`bitpress.planning.recipe` of the module's file."""
    parts = file.relative_to(CORE.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


def imports(file: Path, library: str, with_types: bool = True) -> Iterator[str]:
    """Full names of the modules of a library that a file imports, inside functions too.

    Args:
        with_types: whether imports that only type checkers run count.
    """
    tree = ast.parse(file.read_text())
    blocks = [node for node in ast.walk(tree) if isinstance(node, ast.If)]
    for_types = {
        node
        for block in blocks
        if ast.unparse(block.test) == "TYPE_CHECKING" and not with_types
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == library)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == library:
            for alias in node.names:
                below = CORE.parent / node.module.replace(".", "/") / alias.name
                is_module = below.is_dir() or below.with_suffix(".py").is_file()
                yield f"{node.module}.{alias.name}" if is_module else node.module


@pytest.mark.parametrize("file", MODULES, ids=dotted)
def test_a_package_imports_only_what_stands_before_it(file: Path) -> None:
    importer = dotted(file)
    if importer in ("bitpress", "bitpress.__main__"):
        return
    for imported in imports(file, "bitpress"):
        assert LAYERS.index(package(imported)) <= LAYERS.index(package(importer)), imported


def test_no_modules_import_one_another_in_a_circle() -> None:
    graph = {
        dotted(file): set(imports(file, "bitpress", with_types=False)) - {dotted(file)}
        for file in MODULES
        if dotted(file) != "bitpress"
    }
    # it raises CycleError where there is a circle
    assert len(list(TopologicalSorter(graph).static_order())) >= len(graph)


@pytest.mark.parametrize("library", LIBRARIES)
def test_one_package_alone_imports_the_library(library: str) -> None:
    users = {package(dotted(file)) for file in MODULES if any(imports(file, library))}
    assert users == {LIBRARIES[library]}


@pytest.mark.parametrize("file", MODULES + DATA, ids=lambda file: str(file.relative_to(CORE)))
def test_core_names_no_scheme_and_imports_none(file: Path) -> None:
    if file.suffix == ".py":
        nodes = list(ast.walk(ast.parse(file.read_text())))
        texts = [n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)]
        assert not [node for node in nodes if is_import(node) and "bitpress_" in ast.unparse(node)]
    else:
        texts = [file.read_text()]
    # numerics names number formats, and a scheme may be called as its format is
    if "numerics" not in file.parts:
        for name in SCHEME_NAMES:
            word = re.compile(rf"(?<![\w.-]){re.escape(name)}(?![\w-])")
            assert not [text for text in texts if word.search(text)], name


def is_import(node: ast.AST) -> bool:
    """Whether it is an import statement."""
    return isinstance(node, (ast.Import, ast.ImportFrom))


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_a_scheme_imports_only_the_public_names_of_core(scheme: Path) -> None:
    others = {f"bitpress_{s.name.removeprefix('scheme-')}" for s in SCHEMES if s != scheme}
    for file in (scheme / "src").rglob("*.py"):
        assert set(imports(file, "bitpress")) <= {"bitpress", "bitpress.numerics"}
        assert not [name for other in others for name in imports(file, other)]


SOURCES = sorted((ROOT / "packages").glob("*/src/**/*.py"))


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: file.name)
def test_a_module_has_at_most_400_lines_and_its_functions_50_beside_docstrings(file: Path) -> None:
    text = file.read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert body_lines(node) <= 50, node.name


def body_lines(function: ast.FunctionDef) -> int:
    """Lines of a function, its signature counted and its docstring not."""
    docstring = ast.get_docstring(function, clean=False) or ""
    first, last = function.lineno, function.end_lineno or function.lineno
    return last - first + 1 - (docstring.count("\n") + 1 if docstring else 0)


@pytest.mark.parametrize("name", ["os.environ", "os.getenv"])
def test_no_environment_variable_is_configuration(name: str) -> None:
    # the kit's helpers start processes, which inherit the environment
    files = [
        file
        for file in (ROOT / "packages").glob("*/src/**/*.py")
        if "conformance" not in file.parts
    ]
    assert not [file for file in files if name in file.read_text()]


def test_installed_schemes_are_those_of_the_packages() -> None:
    installed = {entry.name for entry in importlib.metadata.entry_points(group="bitpress.schemes")}
    assert installed == set(SCHEME_NAMES)
