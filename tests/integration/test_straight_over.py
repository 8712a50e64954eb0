"""From a source whose codes a scheme can store, the codes are kept: nothing is rounded again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.coded_layers import (
    AWQ,
    GPTQ,
    GROUP,
    INTEGERS,
    MXFP4,
    Code,
    awq,
    code_layers,
    gptq,
    mxfp4,
    packed,
)
from fixtures.learner_scheme import runnable_model
from torch import Tensor

import bitpress
from bitpress.conformance.commands import command
from bitpress.conformance.models import LLAMA, llama_tensors, tensors_of, write_model


def write_coded(folder: Path, table: dict[str, Any], code: Code) -> tuple[Path, dict[str, Tensor]]:
    """A model whose layers are coded, and the weights that they stand for, float32."""
    tensors = {name: tensor.half() for name, tensor in llama_tensors().items()}
    stored, plain = code_layers(tensors, lambda module: code if ".layers." in module else None)
    weights = {name.removesuffix(".weight"): plain[name] for name in plain if name not in stored}
    config = {**LLAMA, "torch_dtype": "float16", "quantization_config": table}
    return write_model(folder, stored, config), weights


CASES: dict[str, tuple[dict[str, Any], Any, str, list[str]]] = {
    "AWQ to w4a16": (
        AWQ,
        awq,
        "w4a16",
        ["algorithm=rtn", f"group_size={GROUP}", "symmetric=false"],
    ),
    "GPTQ to w4a16": (
        GPTQ,
        gptq,
        "w4a16",
        ["algorithm=rtn", f"group_size={GROUP}"],
    ),
    "packed integers to w4a16": (
        INTEGERS,
        packed,
        "w4a16",
        ["algorithm=rtn", f"group_size={GROUP}"],
    ),
    "MXFP4 to NVFP4": (
        MXFP4,
        mxfp4,
        "nvfp4",
        ["algorithm=rtn", "activations=float"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_codes_are_kept(tmp_path: Path, name: str) -> None:
    table, code, scheme, settings = CASES[name]
    model, weights = write_coded(tmp_path / "m", table, code)
    words = [word for setting in settings for word in ("--set", setting)]
    done = command("compress", model, tmp_path / "out", "--scheme", scheme, *words)
    assert done.returncode == 0, done.stderr
    assert f"{len(weights)} of them hold the source's very numbers" in done.stdout
    manifest = bitpress.inspect(tmp_path / "out")
    assert {layer.error for layer in manifest.layers.values()} == {0.0}
    bitpress.decompress(tmp_path / "out", tmp_path / "dense")
    dense = tensors_of(tmp_path / "dense")
    for module, weight in weights.items():
        assert torch.equal(dense[f"{module}.weight"], weight.half()), module


def test_codes_of_mxfp4_are_kept_where_data_is_for_activations_alone(tmp_path: Path) -> None:
    config = LLAMA | {"num_hidden_layers": 1}
    tensors = llama_tensors(config=config)
    stored, plain = code_layers(tensors, lambda name: mxfp4 if ".layers." in name else None)
    models = (
        runnable_model(tmp_path / "coded/m", stored, config | {"quantization_config": MXFP4}),
        # a 16-bit copy of such a model is known by its numbers
        runnable_model(
            tmp_path / "plain/m", {name: x.bfloat16() for name, x in plain.items()}, config
        ),
    )
    for model in models:
        manifest = bitpress.compress(
            model,
            model.parent / "out",
            scheme="nvfp4",
            settings=["algorithm=rtn"],
            calibration=model.parent / "text.txt",
            samples=3,
            sequence_length=32,
        )
        assert {layer.error for layer in manifest.layers.values()} == {0.0}
        bitpress.decompress(model.parent / "out", model.parent / "dense")
        dense = tensors_of(model.parent / "dense")
        for name in plain.keys() - stored.keys():
            assert torch.equal(dense[name].float(), plain[name]), name
        stored_layers = tensors_of(model.parent / "out")
        assert any(name.endswith(".input_global_scale") for name in stored_layers)


def test_codes_in_groups_of_another_size_are_rounded_again(tmp_path: Path) -> None:
    model, weights = write_coded(tmp_path / "m", INTEGERS, packed)
    settings = ["algorithm=rtn", "group_size=64"]
    manifest = bitpress.compress(model, tmp_path / "out", scheme="w4a16", settings=settings)
    assert len(manifest.layers) == len(weights)
    assert all(layer.error for layer in manifest.layers.values())


def test_zero_points_are_not_kept_by_symmetric_codes(tmp_path: Path) -> None:
    table, code, *_ = CASES["AWQ to w4a16"]
    model, _ = write_coded(tmp_path / "m", table, code)
    settings = ["algorithm=rtn", f"group_size={GROUP}"]
    manifest = bitpress.compress(model, tmp_path / "out", scheme="w4a16", settings=settings)
    assert all(layer.error for layer in manifest.layers.values())


def test_a_plan_with_data_says_that_codes_are_rounded_again(tmp_path: Path) -> None:
    model, _ = write_coded(tmp_path / "m", INTEGERS, packed)
    text = "plain rounding (--effort low) keeps the source's codes"
    for effort, is_said in (("normal", True), ("low", False)):
        warnings = bitpress.plan(model, scheme="w4a16", effort=effort).warnings
        assert any(text in line for line in warnings) == is_said
