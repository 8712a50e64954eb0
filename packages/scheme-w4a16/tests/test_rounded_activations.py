"""`w4a16` with activations of 8 bits: what is stored and how inputs are rounded, against
compressed-tensors, torch's kernel for CPUs, and what vLLM makes of scales.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import given, settings, strategies as st

from bitpress.conformance.commands import refusal
from bitpress.conformance.models import LLAMA, write_model
from bitpress.schemes import pipeline
from bitpress.schemes.activation_quantizer import find_activation_quantizer
from bitpress.schemes.hardware import find_device
from bitpress.schemes.registry import Step, discover
from bitpress.schemes.values import Layer, Statistic, StoredLayer
from bitpress_w4a16 import fp8_inputs

INPUTS = {
    "fp8": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token"},
    "int8": {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "token"},
}
FORMATS = {"fp8": "pack-quantized", "int8": "int-quantized"}


def make_step(**options: Any) -> Step:
    return discover().get("w4a16").step({"algorithm": "rtn"} | options)


def numbers(rows: int, columns: int, seed: int = 0, size: float = 0.02) -> torch.Tensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * size
    return (weight + size / 2).bfloat16().float()


def quantize(weight: torch.Tensor, step: Step, stats: dict[str, Statistic] | None = None) -> Layer:
    return pipeline.quantize_whole(Layer("layer", weight, torch.bfloat16), [step], [stats or {}])


def store(layer: Layer, step: Step) -> StoredLayer:
    return pipeline.serialize(pipeline.pack(layer, [step]), [step])


def observe(step: Step, x: torch.Tensor, weight: torch.Tensor) -> dict[str, Statistic]:
    return dict(
        step.call(
            "observe", inputs=x, reference=x, residual=None, output_gradient=None, weight=weight
        )
    )


def decode_with_compressed_tensors(stored: StoredLayer) -> torch.Tensor:
    """The weight as compressed-tensors decodes it, in float32."""
    group = {"targets": ["Linear"], **stored.config}
    config = {
        "quant_method": "compressed-tensors",
        "format": group.pop("format"),
        "config_groups": {"group_0": group},
        "quantization_status": "compressed",
    }
    parsed = QuantizationConfig.model_validate(config).config_groups["group_0"]
    tensors = {
        name: t.float() if name == "weight_scale" else t for name, t in stored.tensors.items()
    }
    compressor = BaseCompressor.get_value_from_registry(stored.config["format"])
    return compressor.decompress(tensors, parsed)["weight"]


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    st.sampled_from(["fp8", "int8"]),
    st.sampled_from([128, 64, 32, "channel"]),
    st.integers(1, 20),
    st.integers(1, 4),
    st.integers(0, 1000),
    st.sampled_from([0.02, 1e-5, 1e-30, 1e30]),
)
def test_what_is_stored_is_decoded_exactly(  # noqa: PLR0913, PLR0917
    activations: str, group: Any, rows: int, groups: int, seed: int, size: float
) -> None:
    group = 128 if activations == "fp8" else group
    step = make_step(activations=activations, group_size=group)
    width = groups * (128 if group == "channel" else group)
    layer = quantize(numbers(rows, width, seed, size), step)
    stored = store(layer, step)
    assert torch.equal(pipeline.dequantize(stored.tensors, stored.config, [step]), layer.weight)
    assert torch.equal(decode_with_compressed_tensors(stored), layer.weight)
    assert layer.weight.isfinite().all()


@pytest.mark.parametrize("activations", INPUTS)
def test_the_stored_layer_is_what_engines_expect(activations: str) -> None:
    step = make_step(activations=activations)
    stored = store(quantize(numbers(16, 384), step), step)
    codes = {
        "fp8": {"weight_packed": (torch.int32, (16, 48)), "weight_shape": (torch.int64, (2,))},
        "int8": {"weight": (torch.int8, (16, 384))},
    }
    assert {n: (t.dtype, tuple(t.shape)) for n, t in stored.tensors.items()} == {
        **codes[activations],
        "weight_scale": (torch.bfloat16, (16, 3)),
    }
    zero = {"zp_dtype": "torch.int8"} if activations == "int8" else {}
    assert stored.config == {
        "format": FORMATS[activations],
        "weights": {
            "num_bits": 4,
            "type": "int",
            "symmetric": True,
            "dynamic": False,
            "strategy": "group",
            "group_size": 128,
        },
        "input_activations": INPUTS[activations] | {"dynamic": True} | zero,
    }


def test_integer_activations_leave_the_codes_as_they_are() -> None:
    weight, x = numbers(48, 256), torch.randn(400, 256, generator=torch.Generator().manual_seed(1))
    plain, other = (
        make_step(algorithm="gptq", activations=activations) for activations in ("float", "int8")
    )
    expected = quantize(weight, plain, observe(plain, x, weight))
    layer = quantize(weight, other, observe(other, x, weight))
    assert torch.equal(layer.weight, expected.weight)
    assert torch.equal(store(layer, other).tensors["weight"], expected.codes)


@pytest.mark.parametrize("activations", INPUTS)
def test_inputs_are_rounded_as_compressed_tensors_rounds_them(activations: str) -> None:
    x = numbers(64, 128, size=1.0)
    # tokens of zeros, and of one sign
    x[3], x[4], x[5] = 0, x[4].abs(), -x[5].abs()
    step = make_step(activations=activations)
    stored = store(quantize(numbers(8, 128), step), step)
    rounded = find_activation_quantizer(stored.tensors, stored.config, [step])(x)
    args = QuantizationArgs(**INPUTS[activations], dynamic=True)
    scale, zero = calculate_qparams(x.amin(1, keepdim=True), x.amax(1, keepdim=True), args)
    torch.testing.assert_close(rounded, fake_quantize(x, scale, zero, args), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("group", [128, 32, "channel"])
def test_torch_s_kernel_for_cpus_computes_with_these_inputs_and_weights(group: Any) -> None:
    step = make_step(activations="int8", group_size=group)
    layer = quantize(numbers(32, 256), step)
    stored = store(layer, step)
    # as vLLM 0.32 prepares them, in `Dynamic4bitLinearKernel`
    codes = stored.tensors["weight"] + 8
    packed = (codes[:, 1::2] << 4 | codes[:, ::2]).to(torch.uint8)
    scale = stored.tensors["weight_scale"]
    scale = scale.float() if group == "channel" else scale
    size = 256 if group == "channel" else group
    packed = torch.ops.aten._dyn_quant_pack_4bit_weight(packed, scale, None, size, 256, 32)
    x = torch.randn(16, 256, generator=torch.Generator().manual_seed(2)) + 0.3
    output = torch.ops.aten._dyn_quant_matmul_4bit(x, packed, size, 256, 32)

    rounded = find_activation_quantizer(stored.tensors, stored.config, [step])(x)
    torch.testing.assert_close(output, rounded @ layer.weight.T, rtol=1e-5, atol=1e-5)


def convert_scales_as_vllm(scales: torch.Tensor) -> torch.Tensor:
    """The scales that the kernel multiplies with: `convert_bf16_scales_to_fp8` of vLLM 0.32."""
    of_row = (scales.float().abs().amax(1, keepdim=True) / 448).clamp(min=1 / (448 * 512))
    of_group = (scales.float() / of_row).clamp(-448, 448).to(torch.float8_e4m3fn)
    of_group = (of_group.float() / 8).to(torch.float8_e4m3fn)
    return of_group.float() * (of_row * 8)


@pytest.mark.parametrize("size", [1.0, 0.02, 1e-3, 1e-5])
@pytest.mark.parametrize("algorithm", ["rtn", "gptq"])
def test_vllm_keeps_the_scales_that_are_multiplied_with_fp8(algorithm: str, size: float) -> None:
    # groups differ by powers of ten
    weight = numbers(64, 512, size=size).view(64, 4, 128) * torch.logspace(-2, 1, 4).view(1, 4, 1)
    weight = weight.view(64, 512).bfloat16().float()
    step = make_step(activations="fp8", algorithm=algorithm)
    x = torch.randn(800, 512, generator=torch.Generator().manual_seed(1))
    stats = observe(step, x, weight) if algorithm == "gptq" else {}
    layer = quantize(weight, step, stats)
    scales = store(layer, step).tensors["weight_scale"]
    # bfloat16 has eight significant bits
    torch.testing.assert_close(convert_scales_as_vllm(scales), scales.float(), rtol=2**-8, atol=0)


def test_each_storable_scale_is_the_nearest_that_vllm_keeps() -> None:
    scale = torch.rand(64, 8, generator=torch.Generator().manual_seed(0)) * 0.05 + 0.001
    stored = fp8_inputs.storable_scale(scale, torch.float32)
    # the row's largest has 448 of E4M3's numbers, the eighth of it 56
    of_row = scale.amax(1, keepdim=True) / 56
    kept = torch.arange(1, 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    kept = kept[kept <= 56] * of_row.unsqueeze(2)  # (rows, 1, numbers)
    nearest = (kept - scale.unsqueeze(2)).abs().amin(2)
    torch.testing.assert_close((stored - scale).abs(), nearest, rtol=1e-4, atol=1e-8)


def test_codes_are_made_for_the_scales_that_are_stored() -> None:
    step = make_step(activations="fp8")
    layer = quantize(numbers(16, 256), step)
    scale = layer.qparams["scale"].float().repeat_interleave(128, 1)
    nearest = (numbers(16, 256) / scale).round().clamp(-8, 7)
    assert torch.equal(layer.weight, nearest * scale)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("activations=fp8", "group_size=64"), "vLLM's kernel reads groups of 128 only"),
        (("activations=fp8", "group_size=channel"), "not group_size=channel"),
        (("activations=fp8", "symmetric=false"), "no zero points of weights"),
        (("activations=int8", "symmetric=false"), "no zero points of weights"),
    ],
)
def test_what_no_kernel_reads_is_refused_at_plan_time(
    tmp_path: Path, settings: tuple[str, ...], words: str
) -> None:
    changes = [word for setting in settings for word in ("--set", setting)]
    assert words in refusal("plan", write_model(tmp_path / "m"), "--scheme", "w4a16", *changes)


def test_a_width_that_the_kernel_does_not_take_is_refused(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m", config=LLAMA | {"intermediate_size": 192})
    line = refusal("plan", model, "--scheme", "w4a16", "--set", "activations=fp8")
    assert "width 192 is not a multiple of group_size 128" in line


@pytest.mark.parametrize(
    ("activations", "rows", "device", "levels"),
    [
        ("fp8", 256, "H100", []),
        ("fp8", 192, "H100", ["degraded"]),
        ("int8", 40, "CPU Arm", []),
        ("float", 40, "CPU x86", ["unsupported"]),
    ],
)
def test_shapes_are_judged_by_the_kernel_that_reads_them(
    activations: str, rows: int, device: str, levels: list[str]
) -> None:
    findings = make_step(activations=activations).call(
        "validate_shape", shape=(rows, 256), cut=None, hardware=find_device(device)
    )
    assert [finding.level for finding in findings] == levels


@pytest.mark.parametrize(
    ("activations", "device", "level"),
    [
        ("fp8", "H100", "recommended"),
        ("fp8", "L4", "unsupported"),
        ("fp8", "B200", "unsupported"),
        ("fp8", "MI300X", "unsupported"),
        ("fp8", "CPU x86", "unsupported"),
        ("int8", "CPU Arm", "recommended"),
        ("int8", "CPU x86", "degraded"),
        ("int8", "Intel Data Center GPU Max", "supported"),
        ("int8", "H100", "unsupported"),
        ("int8", "MI300X", "unsupported"),
    ],
)
def test_hardware_is_judged_by_what_its_engine_runs(
    activations: str, device: str, level: str
) -> None:
    step = make_step(activations=activations)
    assert step.call("validate_hardware", hardware=find_device(device))[0].level == level
