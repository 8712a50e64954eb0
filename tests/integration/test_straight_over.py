"""From a source whose codes a scheme can store, the codes are kept: nothing is rounded again."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.architectures import build
from fixtures.coded_layers import (
    AWQ,
    FP8_ROWS,
    FP8_TILES,
    GPTQ,
    GROUP,
    INT8_ROWS,
    INTEGERS,
    MXFP4,
    MXFP8,
    Code,
    awq,
    code_layers,
    config_of,
    fp8_rows,
    fp8_tiles,
    gptq,
    int8_rows,
    mxfp4,
    mxfp8,
    packed,
)
from fixtures.learner_scheme import runnable_model
from torch import Tensor

import bitpress
from bitpress.conformance.commands import command
from bitpress.conformance.models import LLAMA, llama_tensors, tensors_of, write_model
from bitpress.output.manifest import Manifest


def write_coded(folder: Path, table: dict[str, Any], code: Code) -> tuple[Path, dict[str, Tensor]]:
    """A model whose layers are coded, and the weights that they stand for, float32."""
    tensors = {name: tensor.half() for name, tensor in llama_tensors().items()}
    stored, plain = code_layers(tensors, lambda module: code if ".layers." in module else None)
    weights = {
        name.removesuffix(".weight"): weight
        for name, weight in plain.items()
        if stored.get(name) is not weight
    }
    config = {**LLAMA, "torch_dtype": "float16", "quantization_config": table}
    return write_model(folder, stored, config), weights


# From a source's table and codes, with the options that name its form, to a scheme.
CASES: dict[str, tuple[dict[str, Any], Code, str, list[str]]] = {
    "AWQ to w4a16": (AWQ, awq, "w4a16", [f"group_size={GROUP}", "symmetric=false"]),
    "GPTQ to w4a16": (GPTQ, gptq, "w4a16", [f"group_size={GROUP}"]),
    "packed integers to w4a16": (INTEGERS, packed, "w4a16", [f"group_size={GROUP}"]),
    "MXFP4 to NVFP4": (MXFP4, mxfp4, "nvfp4", ["activations=float"]),
    "MXFP4 to MXFP4": (MXFP4, mxfp4, "mxfp4", []),
    "MXFP8 to MXFP8": (MXFP8, mxfp8, "mxfp8", []),
    "FP8 to fp8": (FP8_ROWS, fp8_rows, "fp8", []),
    "FP8 in tiles to fp8-block": (FP8_TILES, fp8_tiles, "fp8-block", []),
    "INT8 to int8": (INT8_ROWS, int8_rows, "int8", []),
}
ALGORITHMS = ("gptq", "rtn")


@pytest.mark.parametrize(
    ("name", "algorithm"),
    [*itertools.product(CASES, ALGORITHMS), ("AWQ to w4a16", "awq")],
)
def test_codes_are_kept_by_every_algorithm_without_data(
    tmp_path: Path, name: str, algorithm: str
) -> None:
    table, code, scheme, settings = CASES[name]
    model, weights = write_coded(tmp_path / "m", table, code)
    settings = [*settings, f"algorithm={algorithm}"]
    plan = bitpress.plan(model, scheme=scheme, settings=settings)
    kept = f"{len(weights)} layers keep the source's codes, to the bit: no data moves their weights"
    assert not plan.calibrated
    assert kept in plan.warnings

    words = [word for setting in settings for word in ("--set", setting)]
    done = command("compress", model, tmp_path / "out", "--scheme", scheme, *words)
    assert done.returncode == 0, done.stderr
    assert f"{len(weights)} of them keep the source's codes" in done.stdout
    manifest = bitpress.inspect(tmp_path / "out")
    assert manifest.data is None
    assert {layer.error for layer in manifest.layers.values()} == {0.0}
    bitpress.decompress(tmp_path / "out", tmp_path / "dense")
    dense = tensors_of(tmp_path / "dense")
    for module, weight in weights.items():
        assert torch.equal(dense[f"{module}.weight"], weight.half()), module
    assert not bitpress.verify(tmp_path / "out", against=model).faults


def compress_on_data(model: Path, out: str = "out", **options: Any) -> Manifest:
    """A runnable model, compressed beside it on a short text."""
    manifest: Manifest = bitpress.compress(
        model,
        model.parent / out,
        calibration=model.parent / "text.txt",
        samples=3,
        sequence_length=32,
        **options,
    )
    return manifest


@pytest.mark.parametrize("algorithm", ["gptq", "rtn"])
def test_codes_of_mxfp4_are_kept_where_data_is_for_activations_alone(
    tmp_path: Path, algorithm: str
) -> None:
    config = LLAMA | {"num_hidden_layers": 1}
    tensors = llama_tensors(config=config)
    stored, plain = code_layers(tensors, lambda name: mxfp4 if ".layers." in name else None)
    models = [runnable_model(tmp_path / "coded/m", stored, config | {"quantization_config": MXFP4})]
    if algorithm == "rtn":
        # a 16-bit copy of such a model is known by its numbers
        copied = {name: x.bfloat16() for name, x in plain.items()}
        models.append(runnable_model(tmp_path / "plain/m", copied, config))
    for model in models:
        manifest = compress_on_data(model, scheme="nvfp4", settings=[f"algorithm={algorithm}"])
        assert manifest.data is not None
        assert {layer.error for layer in manifest.layers.values()} == {0.0}
        bitpress.decompress(model.parent / "out", model.parent / "dense")
        dense = tensors_of(model.parent / "dense")
        for name in plain.keys() - stored.keys():
            assert torch.equal(dense[name].float(), plain[name]), name
        stored_layers = tensors_of(model.parent / "out")
        assert any(name.endswith(".input_global_scale") for name in stored_layers)


@pytest.mark.parametrize("algorithm", ["gptq", "awq"])
def test_beside_codes_that_are_kept_other_layers_are_fitted_to_data(
    tmp_path: Path, algorithm: str
) -> None:
    config = LLAMA | {"num_hidden_layers": 2, "torch_dtype": "float16"}
    tensors = {name: tensor.half() for name, tensor in llama_tensors(config=config).items()}
    stored, plain = code_layers(tensors, lambda name: packed if ".mlp." in name else None)
    model = runnable_model(tmp_path / "m", stored, config | {"quantization_config": INTEGERS})
    settings = [f"group_size={GROUP}", f"algorithm={algorithm}"]
    manifest = compress_on_data(model, scheme="w4a16", settings=settings)
    for module, layer in manifest.layers.items():
        is_kept = ".mlp." in module
        assert (layer.error == 0) == is_kept, module
        # no inputs of theirs are looked at
        assert (layer.output_error is None) == is_kept, module
    bitpress.decompress(tmp_path / "out", tmp_path / "dense")
    dense = tensors_of(tmp_path / "dense")
    for name in plain.keys() - stored.keys():
        assert torch.equal(dense[name], plain[name].half()), name


def test_experts_keep_their_codes_beside_attention_that_is_fitted(tmp_path: Path) -> None:
    made = build("qwen3_moe", tmp_path / "made")
    tensors = tensors_of(made)
    stored, _ = code_layers(
        {name: x.half() for name, x in tensors.items()},
        lambda name: packed if ".experts." in name else None,
    )
    config = config_of(made, INTEGERS) | {"dtype": "float16", "torch_dtype": "float16"}
    model = runnable_model(tmp_path / "m", stored, config)
    options = {"scheme": "w4a16", "settings": [f"group_size={GROUP}"]}
    manifest = compress_on_data(model, **options, threads=1)
    is_kept = {module: ".experts." in module for module in manifest.layers}
    assert set(is_kept.values()) == {False, True}
    assert {name: layer.error == 0 for name, layer in manifest.layers.items()} == is_kept
    # no expert is warned of that was sent few tokens
    assert all(manifest.layers[name].tokens is None for name in is_kept)

    compress_on_data(model, "by-threads", **options, threads=3)
    tensors, by_threads = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "by-threads")
    assert all(torch.equal(tensors[name], by_threads[name]) for name in tensors)


def test_a_search_finds_that_codes_which_are_kept_cost_nothing(tmp_path: Path) -> None:
    config = LLAMA | {"num_hidden_layers": 1, "torch_dtype": "float16"}
    tensors = {name: tensor.half() for name, tensor in llama_tensors(config=config).items()}
    stored, _ = code_layers(tensors, lambda name: packed if ".layers." in name else None)
    model = runnable_model(tmp_path / "m", stored, config | {"quantization_config": INTEGERS})
    kept, other = f"w4a16:group_size={GROUP}", "w4a16:group_size=64"
    result = bitpress.search(
        model,
        tmp_path / "recipe.toml",
        schemes=[kept, other],
        budget=4.5,
        calibration=tmp_path / "text.txt",
        samples=8,
        sequence_length=32,
    )
    costs = {
        name: [cost for (_, candidate), cost in result.divergences.items() if candidate == name]
        for name in (kept, other)
    }
    assert costs[kept]
    assert max(costs[kept]) < 1e-9
    assert min(costs[other]) > 1e-7


def test_what_turns_out_not_to_fit_is_rounded_to_nearest_with_a_warning(tmp_path: Path) -> None:
    def negative(rows: int, columns: int) -> tuple[dict[str, Tensor], Tensor]:
        parts, weight = packed(rows, columns)
        return parts | {"weight_scale": -parts["weight_scale"]}, -weight

    model, weights = write_coded(tmp_path / "m", INTEGERS, negative)
    with pytest.warns(UserWarning, match="w4a16 cannot store: rounded to nearest") as warned:
        manifest = bitpress.compress(
            model, tmp_path / "out", scheme="w4a16", settings=[f"group_size={GROUP}"]
        )
    assert len(warned) == len(weights)
    assert all(layer.error for layer in manifest.layers.values())


# Options of another form, and what the source has.
OTHERS = {
    "groups of another size": (
        INTEGERS,
        packed,
        ["group_size=64"],
        "4-bit integers in groups of 32",
    ),
    "no zero points": (
        AWQ,
        awq,
        [f"group_size={GROUP}"],
        "4-bit integers in groups of 32 with zero",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_codes_of_another_form_are_rounded_again_and_the_plan_says_so(
    tmp_path: Path, name: str
) -> None:
    table, code, settings, form = OTHERS[name]
    model, weights = write_coded(tmp_path / "m", table, code)
    plan = bitpress.plan(model, scheme="w4a16", settings=settings)
    assert plan.calibrated
    assert not plan.kept_codes
    (remark,) = [line for line in plan.warnings if "rounded again" in line]
    assert form in remark
    assert f"{len(weights)} layers" in remark
    manifest = bitpress.compress(
        model, tmp_path / "out", scheme="w4a16", settings=[*settings, "algorithm=rtn"]
    )
    assert all(layer.error for layer in manifest.layers.values())
