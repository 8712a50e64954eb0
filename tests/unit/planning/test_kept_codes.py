"""A layer keeps its source's codes where its scheme says so, and a third party's scheme can."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fixtures.toy_scheme import TOY
from fixtures.toy_source import TOY_SOURCE, install_toy_source

import bitpress
from bitpress.conformance.commands import install, plugins, refusal
from bitpress.conformance.models import LLAMA, llama_tensors, tensors_of, write_model

KEPT, OTHER = "model.layers.1.mlp.down_proj", "model.layers.1.self_attn.o_proj"
FORM = 'CodeForm("integer", 8, (1, shape[1]), torch.float32)'


def scheme(keeping: str) -> str:
    """The toy with an option for data that it needs unless codes are kept.

    Args:
        keeping: what `keep_codes` returns.
    """
    module = TOY.replace(
        '"the largest code")\n',
        '"the largest code")\n'
        '    fitted: bool = option(True, "whether data is needed")\n'
        "    @property\n    def calibrated(self): return self.fitted\n",
    )
    module = module.replace(
        "    codes = (layer.weight / scale).round()\n",
        "    if layer.quantized is not None: scale = layer.quantized.scale\n"
        "    codes = (layer.weight / scale).round()\n",
    )
    hook = f"@hookimpl\ndef keep_codes(form, shape, dtype, options):\n    return {keeping}\n\n"
    return module.replace("@hookimpl\ndef serialize", f"{hook}@hookimpl\ndef serialize")


def install_both(folder: Path, keeping: str) -> Path:
    source = TOY_SOURCE.replace("StoredPart, hookimpl", "StoredPart, hookimpl, CodeForm").replace(
        "parts, decode)", f"parts, decode, form={FORM})"
    )
    module = source.replace("from bitpress", "import torch\nfrom bitpress", 1)
    install(
        folder,
        "bitpress-scheme-toy",
        scheme(keeping),
        "[bitpress.schemes]\ntoy = bitpress_scheme_toy\n",
    )
    return install_toy_source(folder, module)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model with one layer in codes, whose scales are not those of its largest weights."""
    tensors = llama_tensors()
    shape = tensors.pop(f"{KEPT}.weight").shape
    codes = torch.randint(-90, 90, shape, generator=torch.Generator().manual_seed(0)).char()
    stored = {f"{KEPT}.codes": codes, f"{KEPT}.steps": torch.full((len(codes), 1), 1 / 300)}
    config = {**LLAMA, "quantization_config": {"quant_method": "toy"}}
    return write_model(tmp_path / "model", tensors | stored, config)


def test_only_layers_whose_codes_are_not_kept_need_data(tmp_path: Path, model: Path) -> None:
    with plugins(install_both(tmp_path / "plugins", "attrs.evolve(options, fitted=False)")):
        whole = bitpress.plan(model, scheme="toy")
        rule = {"match": KEPT, "steps": [{"use": "toy"}]}
        alone = bitpress.plan(model, recipe={"layers": [rule]})
        manifest = bitpress.compress(model, tmp_path / "out", recipe={"layers": [rule]})
    assert (whole.calibrated, alone.calibrated) == (True, False)
    assert whole.kept_codes == alone.kept_codes == {KEPT}
    needs_data = {name: stack.calibrated for stack in whole.stacks for name in stack.members}
    assert not needs_data[KEPT]
    assert needs_data[OTHER]
    assert {name: layer.error for name, layer in manifest.layers.items()} == {KEPT: 0.0}
    codes = tensors_of(model)[f"{KEPT}.codes"]
    assert torch.equal(tensors_of(tmp_path / "out")[f"{KEPT}.weight"], codes)


@pytest.mark.parametrize("keeping", ["None", "options if form.bits == 4 else None"])
def test_a_scheme_may_leave_codes_of_a_form(tmp_path: Path, model: Path, keeping: str) -> None:
    with plugins(install_both(tmp_path / "plugins", keeping)):
        plan = bitpress.plan(model, scheme="toy")
    assert not plan.kept_codes
    assert [line for line in plan.warnings if f"first: {KEPT}, which has 8-bit integers" in line]


def test_what_is_no_options_is_refused(tmp_path: Path, model: Path) -> None:
    path = install_both(tmp_path / "plugins", "'rtn'")
    line = refusal("plan", model, "--scheme", "toy", path=path)
    assert "scheme toy" in line
    assert "keep_codes returned str, not its options" in line
