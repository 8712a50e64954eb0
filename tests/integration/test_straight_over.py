"""From a source whose codes a scheme can store, the codes are kept: nothing is rounded again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bitpress
from bitpress import numerics
from bitpress.conformance.commands import command
from bitpress.conformance.models import LLAMA, llama_tensors, tensors_of, write_model

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
GROUP = 32


def random(*shape: int, low: int = 0, high: int = 16) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(shape[0]))


def scales(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return (torch.rand(shape, generator=generator) * 0.05 + 0.01).half()


def write_coded(folder: Path, table: dict[str, Any], code: Any) -> tuple[Path, dict[str, Tensor]]:
    """A model whose layers are coded, and the weights that they stand for, float32."""
    stored: dict[str, Tensor] = {}
    weights = {}
    for name, tensor in llama_tensors().items():
        if ".layers." not in name or tensor.ndim != 2:
            stored[name] = tensor.half()
            continue
        module = name.removesuffix(".weight")
        parts, weights[module] = code(*tensor.shape)
        stored |= {f"{module}.{leaf}": part for leaf, part in parts.items()}
    config = {**LLAMA, "torch_dtype": "float16", "quantization_config": table}
    return write_model(folder, stored, config), weights


def awq(rows: int, columns: int) -> tuple[dict[str, Tensor], Tensor]:
    codes, zeros = random(columns, rows), random(columns // GROUP, rows)
    scale = scales(columns // GROUP, rows)
    of_columns = torch.arange(columns) // GROUP
    weight = (codes - zeros[of_columns]).float() * scale[of_columns].float()

    def pack(numbers: Tensor) -> Tensor:
        in_words = numbers.reshape(len(numbers), -1, 8)[:, :, [0, 2, 4, 6, 1, 3, 5, 7]]
        return numerics.pack_bytes(in_words.flatten(1).to(torch.uint8), 4).view(torch.int32)

    return {"qweight": pack(codes), "qzeros": pack(zeros), "scales": scale}, weight.T.contiguous()


def gptq(rows: int, columns: int) -> tuple[dict[str, Tensor], Tensor]:
    codes, scale = random(rows, columns), scales(columns // GROUP, rows)
    of_columns = torch.arange(columns) // GROUP
    weight = (codes - 8).float() * scale.T[:, of_columns].float()
    words = numerics.pack_bytes(codes.to(torch.uint8), 4).view(torch.int32).T.contiguous()
    zeros = torch.full((columns // GROUP, rows // 2), 0x77, dtype=torch.uint8)
    parts = {"qweight": words, "qzeros": zeros.view(torch.int32), "scales": scale}
    return parts | {"g_idx": of_columns.int()}, weight


def packed(rows: int, columns: int) -> tuple[dict[str, Tensor], Tensor]:
    codes, scale = random(rows, columns, low=-8, high=8).char(), scales(rows, columns // GROUP)
    weight = codes.float() * scale.float().repeat_interleave(GROUP, 1)
    parts = {"weight_packed": numerics.pack_words(codes, 4), "weight_scale": scale}
    return parts | {"weight_shape": torch.tensor([rows, columns])}, weight


def mxfp4(rows: int, columns: int) -> tuple[dict[str, Tensor], Tensor]:
    codes = random(rows, columns)
    exponents = random(rows, columns // GROUP, low=112, high=127)
    power = torch.exp2(exponents.float() - 127)
    weight = E2M1[codes] * power.repeat_interleave(GROUP, 1)
    parts = {"weight_packed": numerics.pack_bytes(codes.to(torch.uint8), 4)}
    return parts | {"weight_scale": exponents.to(torch.uint8)}, weight


def compressed_tensors(layout: str, **weights: Any) -> dict[str, Any]:
    weights = {"num_bits": 4, "strategy": "group", "group_size": GROUP, **weights}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": groups}


INTEGERS = compressed_tensors("pack-quantized", type="int", symmetric=True)
CASES: dict[str, tuple[dict[str, Any], Any, str, list[str]]] = {
    "AWQ to w4a16": (
        {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"},
        awq,
        "w4a16",
        ["algorithm=rtn", f"group_size={GROUP}", "symmetric=false"],
    ),
    "GPTQ to w4a16": (
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP},
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
        compressed_tensors("mxfp4-pack-quantized", type="float", scale_dtype="torch.uint8"),
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
    text = "without it (--effort low) a scheme that can store the source's codes keeps them"
    for effort, is_said in (("normal", True), ("low", False)):
        warnings = bitpress.plan(model, scheme="w4a16", effort=effort).warnings
        assert any(text in line for line in warnings) == is_said
