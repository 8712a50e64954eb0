"""Schemes are found by their entry points: a broken one is reported and harms nobody, and none
reaches its neighbor.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from fixtures.toy_scheme import TOY, install_toy

import bitpress
from bitpress import Layer
from bitpress.conformance.commands import command, install, plugins, refusal
from bitpress.conformance.models import files_of, write_model
from bitpress.schemes.registry import Registry, discover

SCHEME = "import attrs, bitpress\nfrom bitpress import hookimpl, option\n"
QUANTIZE = "@hookimpl\ndef quantize(layer): return layer\n"
# what is wrong: (the module, what is reported)
BROKEN = {
    "it raises when imported": (
        "raise RuntimeError('needs a moon\\nin phase')",
        ["RuntimeError: needs a moon in phase"],
    ),
    "it imports what is not there": ("import moonlight", ["ModuleNotFoundError", "moonlight"]),
    "it is no Python": ("def quantize(:", ["SyntaxError"]),
    "it ends the process": ("raise SystemExit(3)", ["SystemExit: 3"]),
    "it has no hooks": (
        SCHEME + "def quantize(layer): return layer\n",
        ["no function is marked @bitpress.hookimpl"],
    ),
    "a hook is misspelt": (
        SCHEME + QUANTIZE.replace("quantize", "quantise"),
        ["quantise", "unknown hook"],
    ),
    "a hook is misspelt beside good ones": (
        SCHEME + QUANTIZE + "@hookimpl\ndef serialise(layer): pass\n",
        ["serialise", "unknown hook"],
    ),
    "an argument is misspelt": (
        SCHEME + QUANTIZE.replace("(layer)", "(layer, option)"),
        ["quantize", "option"],
    ),
    "its options are no options": (
        SCHEME + QUANTIZE + "Options = dict\n",
        ["Options is not a subclass of bitpress.Options"],
    ),
    "its options are a value": (
        SCHEME + QUANTIZE + "Options = 3\n",
        ["Options is not a subclass of bitpress.Options"],
    ),
    "an option has no default": (
        SCHEME + QUANTIZE + "@attrs.frozen\nclass Options(bitpress.Options):\n    size: int\n",
        ["size"],
    ),
    "an option's default is refused by its own check": (
        SCHEME + QUANTIZE + "@attrs.frozen\nclass Options(bitpress.Options):\n"
        "    size: int = option(3, '', validator=attrs.validators.lt(2))\n",
        ["size"],
    ),
    "an option's type is unknown": (
        SCHEME
        + QUANTIZE
        + "@attrs.frozen\nclass Options(bitpress.Options):\n    size: 'Moon' = option(3, '')\n",
        ["Moon"],
    ),
}


def install_scheme(folder: Path, name: str, module: str) -> Path:
    """A package `bitpress-scheme-NAME` with the scheme NAME."""
    entry = f"[bitpress.schemes]\n{name} = bitpress_scheme_{name}\n"
    return install(folder, f"bitpress-scheme-{name}", module, entry)


def discovered(folder: Path) -> Registry:
    with plugins(folder):
        return discover()


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_plugin_is_reported_and_the_others_keep_working(
    tmp_path: Path, fault: str
) -> None:
    module, words = BROKEN[fault]
    folder = install_scheme(install_toy(tmp_path / "p"), "broken", module)
    done = command("schemes", path=folder)
    assert done.returncode == 0, done.stderr
    assert "bitpress-scheme-toy 1.0" in done.stdout
    assert "broken" not in done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("problem: broken of bitpress-scheme-broken cannot be used: ")
    for word in words:
        assert word in line
    (problem,) = json.loads(command("schemes", "--json", path=folder).stdout)["problems"]
    assert (problem["name"], problem["package"]) == ("broken", "bitpress-scheme-broken")
    model = write_model(tmp_path / "m")
    assert command("plan", model, "--scheme", "toy", path=folder).returncode == 0
    message = refusal("plan", model, "--scheme", "broken", path=folder)
    assert "scheme broken of bitpress-scheme-broken cannot be used" in message


@pytest.mark.parametrize(
    ("entry", "word"),
    [("no_such_module", "no_such_module"), ("bitpress_scheme_toy:missing", "missing")],
    ids=["the module is missing", "the object is missing"],
)
def test_an_entry_point_that_leads_nowhere_is_reported(
    tmp_path: Path, entry: str, word: str
) -> None:
    install_toy(tmp_path / "p")
    registry = discovered(
        install(tmp_path / "p", "stray", "", f"[bitpress.schemes]\nstray = {entry}\n")
    )
    assert list(registry.schemes) == ["toy"]
    assert word in registry.problems[0].text


def test_two_packages_with_one_name_are_reported_and_neither_is_used(tmp_path: Path) -> None:
    folder = install_scheme(install_toy(tmp_path / "p"), "other", TOY)
    registry = discovered(
        install(folder, "a-second-toy", TOY, "[bitpress.schemes]\ntoy = a_second_toy\n")
    )
    assert list(registry.schemes) == ["other"]
    (problem,) = registry.problems
    assert (
        problem.text
        == "a-second-toy and bitpress-scheme-toy provide the same name; uninstall one of them"
    )


def test_a_scheme_that_fails_to_judge_a_device_is_listed_and_says_so(tmp_path: Path) -> None:
    silly = TOY.replace(
        'return [Finding("supported"', 'raise ValueError("no idea"); [Finding("supported"'
    )
    folder = install_scheme(install_toy(tmp_path / "p"), "silly", silly)
    done = command("schemes", path=folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert "bitpress-scheme-toy" in done.stdout
    assert "bitpress-scheme-silly" in done.stdout
    assert "ValueError: no idea" in command("schemes", "silly", path=folder).stdout


GREEDY = (
    TOY.replace('"""Toy integers, for tests."""', '"""Asks to be called first, always."""')
    .replace("@hookimpl\n", "@hookimpl(tryfirst=True)\n")
    .replace("    scale =", "    raise RuntimeError('a neighbor was called')\n    scale =")
)
WRAPPER = (
    "\n@hookimpl(wrapper=True)\ndef pack(layer):\n    raise RuntimeError('a neighbor was called')"
    "\n    yield\n"
)


@pytest.mark.parametrize("module", [GREEDY, TOY + WRAPPER], ids=["first", "wrapper"])
def test_a_hook_never_reaches_a_neighbor(tmp_path: Path, module: str) -> None:
    model = write_model(tmp_path / "m")
    with plugins(install_toy(tmp_path / "alone")):
        bitpress.compress(model, tmp_path / "expected", scheme="toy")
    folder = install_scheme(
        install_scheme(install_toy(tmp_path / "p"), "aaa", module), "zzz", module
    )
    with plugins(folder):
        assert list(discover().schemes) == ["aaa", "toy", "zzz"]
        bitpress.compress(model, tmp_path / "out", scheme="toy")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "expected")


TRACE = '''
"""Records which layers are quantized."""
from pathlib import Path
from bitpress import hookimpl

@hookimpl(wrapper=True)
def quantize(layer, options):
    result = yield
    with Path(__file__).with_name("trace.txt").open("a") as f:
        f.write(f"{layer.name} {type(options).__module__} {result.codes.dtype}\\n")
    return result
'''


def test_an_extension_wraps_every_scheme_and_changes_no_byte(tmp_path: Path) -> None:
    model, folder = (
        write_model(tmp_path / "m"),
        install_scheme(install_toy(tmp_path / "p"), "other", TOY),
    )
    with plugins(folder):
        bitpress.compress(model, tmp_path / "expected", scheme="toy")
    install(folder, "bitpress-trace", TRACE, "[bitpress.extensions]\ntrace = bitpress_trace\n")
    with plugins(folder):
        assert (list(discover().schemes), discover().problems) == (["other", "toy"], ())
        bitpress.compress(model, tmp_path / "out", scheme="toy")
        bitpress.compress(model, tmp_path / "out2", scheme="other")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "expected")
    lines = (folder / "trace.txt").read_text().splitlines()
    for module in ("bitpress_scheme_toy", "bitpress_scheme_other"):
        assert f"model.layers.1.mlp.[gate_proj, up_proj] {module} torch.int8" in lines


@pytest.mark.parametrize(
    ("module", "word"),
    [
        ("import moonlight", "moonlight"),
        (SCHEME + QUANTIZE, "an extension only wraps: mark quantize with hookimpl(wrapper=True)"),
    ],
    ids=["it fails at import", "it answers in a scheme's place"],
)
def test_a_broken_extension_is_reported_and_schemes_work_without_it(
    tmp_path: Path, module: str, word: str
) -> None:
    install(
        install_toy(tmp_path / "p"),
        "bitpress-trace",
        module,
        "[bitpress.extensions]\ntrace = bitpress_trace\n",
    )
    registry = discovered(tmp_path / "p")
    assert list(registry.schemes) == ["toy"]
    assert word in registry.problems[0].text


def test_a_hook_gets_only_the_arguments_it_names(with_toy: Path) -> None:
    import torch

    layer = Layer("layer", torch.ones(2, 4), torch.bfloat16)
    step = discover().get("toy").step({"levels": 3})
    # the toy names no `stats`
    assert step.call("quantize", layer=layer, stats={}).codes.tolist() == [[3] * 4] * 2
    # and leaves this hook out
    assert step.call("pack", layer=layer) is None


LIGHT = """
import sys
sys.path.insert(0, sys.argv.pop(1))
try:
    import bitpress.cli
    bitpress.cli.main()
except SystemExit as end:
    assert not end.code, end.code
heavy = {"torch", "transformers", "numpy", "safetensors", "huggingface_hub", "pydantic"}
heavy &= set(sys.modules)
assert not heavy, heavy
"""


@pytest.mark.parametrize(
    "words",
    [
        "",
        "--help",
        "--version",
        "schemes",
        "schemes --json",
        "schemes toy --serve-on H100",
        "compress --help",
    ],
)
def test_what_does_no_work_imports_no_torch(toy: Path, words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, toy, *words.split()],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout
