"""A plugin and a core of different versions: what does not fit is reported at discovery, with
what to upgrade; the others work.
"""

from __future__ import annotations

import inspect
from importlib.metadata import version
from pathlib import Path

import pytest
from fixtures.toy_scheme import TOY, install_toy

from bitpress.conformance.commands import command, install, plugins, refusal
from bitpress.conformance.models import write_model
from bitpress.schemes import hookspecs
from bitpress.schemes.registry import discover

HERE = version("bitpress-core")
OTHER = "[bitpress.schemes]\nother = bitpress_scheme_other\n"
# arguments of the hooks of each version
SIGNATURES = {
    "0.1": {
        "observe": "inputs reference residual weight options",
        "rescale": "layer stats options",
        "quantize": "layer stats options",
        "pack": "layer options",
        "serialize": "layer options",
        "validate_hardware": "hardware options",
        "validate_shape": "shape cut hardware options",
        "restore": "tensors config",
        "quantize_inputs": "inputs tensors config",
        "check": "weight options",
        "bound": "tensors config",
    },
    "0.2": {
        "observe": "inputs reference residual output_gradient weight options",
        "rescale": "layer stats options",
        "keep_codes": "form shape dtype options",
        "quantize": "layer stats options",
        "pack": "layer options",
        "serialize": "layer stored options",
        "validate_hardware": "hardware options",
        "validate_shape": "shape cut hardware options",
        "dequantize": "tensors config",
        "expand": "tensors config",
        "quantize_activations": "inputs tensors config",
        "validate_weight": "weight options",
        "error_bound": "tensors config weight bound options",
        "observe_cache": "states options",
        "serialize_cache": "stats dtype options",
        "quantize_cache": "states name tensors config",
    },
}


def test_hooks_change_only_with_their_version() -> None:
    hooks = {
        name: " ".join(inspect.signature(function).parameters)
        for name, function in vars(hookspecs).items()
        if hasattr(function, "bitpress_spec")
    }
    assert hooks == SIGNATURES[hookspecs.VERSION], (
        "raise hookspecs.VERSION to the core that brings these hooks, and note them here"
    )
    assert command("--version").stdout == f"bitpress {HERE} (hooks {hookspecs.VERSION})\n"


# what the package requires: the advice
REQUIREMENTS = {
    "bitpress-core>=99": "pip install --upgrade bitpress-core",
    "bitpress_core ~= 99.1": "pip install --upgrade bitpress-core",
    "bitpress-core==99.*": "pip install --upgrade bitpress-core",
    "bitpress-core<0.0.9": "pip install --upgrade bitpress-scheme-other",
    f"bitpress-core!={HERE}": "pip install --upgrade bitpress-scheme-other",
}


@pytest.mark.parametrize("requirement", REQUIREMENTS)
def test_a_package_for_another_core_is_reported_and_never_imported(
    tmp_path: Path, requirement: str
) -> None:
    folder = install_toy(tmp_path / "p")
    install(
        folder,
        "bitpress-scheme-other",
        "raise SystemExit('imported')",
        OTHER,
        requires=["attrs", requirement],
    )
    done = command("schemes", path=folder)
    assert done.returncode == 0
    assert "bitpress-scheme-toy 1.0" in done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        "problem: other of bitpress-scheme-other cannot be used: it needs bitpress-core "
    )
    assert line.endswith(f" and this is {HERE}: {REQUIREMENTS[requirement]}")
    assert REQUIREMENTS[requirement] in refusal(
        "plan", write_model(tmp_path / "m"), "--scheme", "other", path=folder
    )


@pytest.mark.parametrize(
    "requirement",
    [
        "bitpress-core>=0.0.1,<99",
        "bitpress-core",
        "bitpress-core>=99; extra == 'test'",
        "bitpress-core>=99; python_version < '3'",
    ],
)
def test_a_package_that_allows_this_core_is_used(tmp_path: Path, requirement: str) -> None:
    with plugins(install(tmp_path, "bitpress-scheme-other", TOY, OTHER, requires=[requirement])):
        assert (list(discover().schemes), discover().problems) == (["other"], ())


# what the plugin has that this core lacks: (a text of its source, its replacement, the message)
LATER = {
    "an argument": (
        "def quantize(layer, options)",
        "def quantize(layer, zest, options)",
        f"quantize asks for 'zest', which bitpress-core {HERE} (hooks {hookspecs.VERSION}) does "
        "not give (pip install --upgrade bitpress-core if it is "
        "new)",
    ),
    "an argument, misspelt": (
        "def quantize(layer, options)",
        "def quantize(layer, option)",
        "not give; did you mean 'options'?",
    ),
    "a hook": (
        "@hookimpl\ndef dequantize",
        "@hookimpl\ndef moonwalk(layer): pass\n\n@hookimpl\ndef dequantize",
        f"unknown hook 'moonwalk', which bitpress-core {HERE} (hooks {hookspecs.VERSION}) does not "
        "have "
        "(pip install --upgrade bitpress-core if it is new)",
    ),
}


@pytest.mark.parametrize("addition", LATER)
def test_a_plugin_that_asks_for_more_than_the_core_gives_is_reported(
    tmp_path: Path, addition: str
) -> None:
    text, replacement, message = LATER[addition]
    assert text in TOY
    folder = install(
        install_toy(tmp_path / "p"), "bitpress-scheme-other", TOY.replace(text, replacement), OTHER
    )
    with plugins(folder):
        assert list(discover().schemes) == ["toy"]
        assert message in discover().problems[0].text


def test_a_hook_of_a_later_core_may_be_marked_optional(tmp_path: Path) -> None:
    module = TOY + "\n@hookimpl(optionalhook=True)\ndef moonwalk(layer, moon): pass\n"
    with plugins(install(tmp_path, "bitpress-scheme-other", module, OTHER)):
        assert (list(discover().schemes), discover().problems) == (["other"], ())


def test_a_hook_may_take_fewer_arguments_or_none(tmp_path: Path) -> None:
    module = TOY.replace("def validate_hardware(hardware)", "def validate_hardware()")
    assert module != TOY
    done = command(
        "schemes",
        "other",
        "--serve-on",
        "H100",
        path=install(tmp_path, "bitpress-scheme-other", module, OTHER),
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "runs anywhere" in done.stdout


def test_an_extension_for_a_later_core_is_reported_and_schemes_work_without_it(
    tmp_path: Path,
) -> None:
    entry = "[bitpress.extensions]\ntrace = bitpress_trace\n"
    folder = install(
        install_toy(tmp_path / "p"),
        "bitpress-trace",
        "raise SystemExit",
        entry,
        requires=["bitpress-core>=99"],
    )
    with plugins(folder):
        assert list(discover().schemes) == ["toy"]
        assert "pip install --upgrade bitpress-core" in discover().problems[0].text
