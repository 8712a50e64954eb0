"""What release 0.1 called by other names works in this release, and says the new name."""

from __future__ import annotations

from pathlib import Path

import attrs
import pytest
import torch
from fixtures.toy_scheme import TOY

import bitpress
from bitpress import Layer, numerics
from bitpress.conformance.commands import install, plugins
from bitpress.conformance.models import write_model
from bitpress.errors import Fault
from bitpress.schemes.registry import discover

OLD_NUMERICS = {
    "aim": "gptq_target",
    "clip": "clip_range",
    "expand": "expand_blocks",
    "factor": "factorize_hessian",
    "feedback": "gptq_quantize",
    "grouped": "to_groups",
    "limits": "integer_range",
    "magnitudes": "magnitude_histogram",
    "middle_magnitude": "median_magnitude",
    "moments": "gptq_statistics",
    "reconstruct": "masked_least_squares",
    "search": "search_scales",
    "sweep": "column_sweep",
}
OLD_LAYER = {"keep": "mask", "parts": "qparams", "source": "original_weight"}
OLD_VALUES = {"Stat": "Statistic", "Record": "StoredLayer"}
# the toy scheme of the tests, as it was written for release 0.1
OLD_TOY = (
    TOY.replace("StoredLayer", "Record")
    .replace("qparams", "parts")
    .replace("def dequantize", "def restore")
    .replace("def error_bound", "def bound")
)


@pytest.mark.parametrize(("old", "new"), OLD_NUMERICS.items())
def test_an_old_function_of_numerics_is_the_new_one(old: str, new: str) -> None:
    with pytest.warns(DeprecationWarning, match=rf"\.{old} is now bitpress\.numerics\.{new}"):
        assert getattr(numerics, old) is getattr(numerics, new)


@pytest.mark.parametrize(("old", "new"), OLD_VALUES.items())
def test_an_old_value_class_is_the_new_one(old: str, new: str) -> None:
    with pytest.warns(DeprecationWarning, match=f"{old} is now bitpress.{new}"):
        assert getattr(bitpress, old) is getattr(bitpress, new)


@pytest.mark.parametrize(("old", "new"), OLD_LAYER.items())
def test_a_layer_has_its_old_attributes_and_takes_its_old_keywords(old: str, new: str) -> None:
    layer = Layer("layer", torch.ones(2, 4), torch.bfloat16, **{new: "before"})
    with pytest.warns(DeprecationWarning, match=rf"Layer\.{old} is now Layer\.{new}"):
        assert getattr(layer, old) == "before"
    with pytest.warns(DeprecationWarning, match=rf"Layer\({old}=\.\.\.\) is now Layer\({new}="):
        layer = attrs.evolve(layer, **{old: "after"})
    assert getattr(layer, new) == "after"


@pytest.mark.parametrize(
    ("old", "new", "argument"),
    [
        ("restore", "dequantize", "tensors"),
        ("quantize_inputs", "quantize_activations", "inputs"),
        ("check", "validate_weight", "weight"),
        ("bound", "error_bound", "tensors"),
    ],
)
def test_a_hook_of_the_old_name_is_the_new_one(
    tmp_path: Path, old: str, new: str, argument: str
) -> None:
    module = f"from bitpress import hookimpl\n\n@hookimpl\ndef {old}({argument}): return 'asked'\n"
    entry = "[bitpress.schemes]\ntoy = bitpress_scheme_toy\n"
    install(tmp_path / "plugins", "bitpress-scheme-toy", module, entry)
    with plugins(tmp_path / "plugins"):
        with pytest.warns(DeprecationWarning, match=f"the hook `{old}` is now `{new}`"):
            scheme = discover().get("toy")
        answer = scheme.call(new, inputs=1, tensors={}, weight=2, config=None, options=None)
    assert answer == "asked"


def faults_of_a_run(model: Path, out: Path) -> tuple[Fault, ...]:
    """What verification finds in a model that the toy scheme compressed."""
    bitpress.compress(model, out, scheme="toy")
    return tuple(bitpress.verify(out, against=model).faults)


def test_a_scheme_with_old_hooks_does_what_it_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = "[bitpress.schemes]\ntoy = bitpress_scheme_toy\n"
    install(tmp_path / "plugins", "bitpress-scheme-toy", OLD_TOY, entry)
    model = write_model(tmp_path / "model")
    with plugins(tmp_path / "plugins"):
        with pytest.warns(DeprecationWarning, match="the hook `restore` is now `dequantize`"):
            scheme = discover().get("toy")
        assert scheme.has("dequantize")
        assert scheme.has("error_bound")
        with pytest.warns(DeprecationWarning, match="Layer.parts is now Layer.qparams"):
            faults = faults_of_a_run(model, tmp_path / "out")
        assert faults == ()
