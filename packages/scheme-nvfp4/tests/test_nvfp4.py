"""What `nvfp4` stores, against compressed-tensors' own reading, brute force and counting; and what
its algorithms reach.
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

from bitpress import compress
from bitpress.conformance.commands import refusal
from bitpress.conformance.models import LLAMA, tensors_of, write_model
from bitpress.schemes import pipeline
from bitpress.schemes.activation_quantizer import find_activation_quantizer
from bitpress.schemes.hardware import find_device
from bitpress.schemes.registry import Step, discover
from bitpress.schemes.values import Layer, Statistic, StoredLayer

MAGNITUDES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
# every positive E4M3 number
LOCALS = torch.arange(1, 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
FP4 = {
    "num_bits": 4,
    "type": "float",
    "symmetric": True,
    "strategy": "tensor_group",
    "group_size": 16,
    "scale_dtype": "torch.float8_e4m3fn",
}


def make_step(**options: Any) -> Step:
    return discover().get("nvfp4").step(options)


PLAIN = {"activations": "float", "algorithm": "rtn"}


def numbers(rows: int, columns: int, seed: int = 0, spread: float = 0.0) -> torch.Tensor:
    """Groups of 16 differ by factors of up to 10^spread either way."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 10 ** (spread * (2 * torch.rand(rows, -(-columns // 16), 1, generator=generator) - 1))
    grouped = torch.randn(rows, -(-columns // 16), 16, generator=generator) * sizes
    return grouped.view(rows, -1)[:, :columns].bfloat16().float()


def quantize(weight: torch.Tensor, step: Step, stats: dict[str, Statistic] | None = None) -> Layer:
    layer = Layer("layer", weight, torch.bfloat16)
    return pipeline.quantize_whole(layer, [step], [stats or {}])


def store(layer: Layer, step: Step) -> StoredLayer:
    return pipeline.serialize(pipeline.pack(layer, [step]), [step])


def decode_with_compressed_tensors(stored: StoredLayer) -> torch.Tensor:
    """The weight as compressed-tensors decodes it, which is in bfloat16."""
    group = {
        "targets": ["Linear"],
        **{name: value for name, value in stored.config.items() if name != "format"},
    }
    config = {
        "quant_method": "compressed-tensors",
        "format": stored.config["format"],
        "config_groups": {"group_0": group},
    }
    parsed = QuantizationConfig.model_validate(
        config | {"quantization_status": "compressed"}
    ).config_groups["group_0"]
    return BaseCompressor.get_value_from_registry("nvfp4-pack-quantized").decompress(
        dict(stored.tensors), parsed
    )["weight"]


def combined_scale(layer: Layer) -> torch.Tensor:
    """(out, groups, 1) the multiplier of each group."""
    return (layer.qparams["scale"].float() / layer.qparams["global_scale"]).unsqueeze(2)


AWKWARD = {
    "normal": lambda w: w,
    "a group of zeros": lambda w: w * (torch.arange(w.shape[1]) >= 16),
    "all zeros": lambda w: w * 0,
    "tiny": lambda w: w * 2.0**-100,
    "denormal": lambda w: (w * 2.0**-131).bfloat16().float(),
    "huge": lambda w: w.sign() * torch.finfo(torch.bfloat16).max,
    "one outlier": lambda w: w + 1e4 * (torch.arange(w.numel()) == 5).view_as(w),
}


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    st.sampled_from(sorted(AWKWARD)),
    st.integers(1, 20),
    st.integers(1, 9),
    st.integers(0, 1000),
    st.sampled_from([0, 2, 12]),
)
def test_what_is_stored_is_decoded_exactly(
    kind: str, rows: int, groups: int, seed: int, spread: float
) -> None:
    layer = quantize(
        AWKWARD[kind](numbers(rows, 16 * groups, seed, spread)), step := make_step(**PLAIN)
    )
    stored = store(layer, step)
    assert torch.equal(pipeline.dequantize(stored.tensors, stored.config, [step]), layer.weight)
    assert torch.equal(decode_with_compressed_tensors(stored), layer.weight.bfloat16())
    assert layer.weight.isfinite().all()
    assert (stored.tensors["weight_scale"].float() > 0).all()
    assert not (stored.tensors["weight_scale"].view(torch.uint8) == 0x7F).any()


@pytest.mark.parametrize("kind", ["normal", "tiny", "denormal", "huge"])
def test_numbers_of_any_size_lose_alike(kind: str) -> None:
    weight = AWKWARD[kind](numbers(8, 64))
    result = quantize(weight, make_step(**PLAIN)).weight
    assert (result - weight).double().norm() < 0.12 * weight.double().norm()


def test_two_codes_lie_in_a_byte_the_even_column_in_its_low_half() -> None:
    row = torch.cat([MAGNITUDES, -MAGNITUDES]).unsqueeze(0)
    layer = quantize(row, step := make_step(**PLAIN))
    scale = combined_scale(layer).flatten()
    # all of them are representable
    assert torch.equal(layer.weight / scale, row / scale)
    units = (row / scale).flatten().tolist()
    table = [*MAGNITUDES.tolist(), *(-MAGNITUDES).tolist()]
    codes = [table.index(unit) for unit in units]
    packed = store(layer, step).tensors["weight_packed"].flatten().tolist()
    assert packed == [low | high << 4 for low, high in zip(codes[::2], codes[1::2], strict=True)]


@pytest.mark.parametrize(
    ("activations", "has_input_scale"), [("quantized", True), ("float", False)]
)
def test_the_stored_layer_is_what_compressed_tensors_expects(
    activations: str, has_input_scale: bool
) -> None:
    step = make_step(activations=activations, algorithm="rtn")
    stored = store(quantize(numbers(24, 64), step), step)
    inputs = {"input_global_scale": (torch.float32, (1,))} if has_input_scale else {}
    assert {n: (t.dtype, tuple(t.shape)) for n, t in stored.tensors.items()} == {
        "weight_packed": (torch.uint8, (24, 32)),
        "weight_scale": (torch.float8_e4m3fn, (24, 4)),
        "weight_global_scale": (torch.float32, (1,)),
        **inputs,
    }
    assert stored.config == {
        "format": "nvfp4-pack-quantized",
        "weights": FP4 | {"dynamic": False},
        "input_activations": FP4 | {"dynamic": "local"} if has_input_scale else None,
    }


def test_a_group_s_scale_is_the_best_e4m3_number_of_an_octave() -> None:
    weight = numbers(16, 64, spread=1)
    layer = quantize(weight, make_step(**PLAIN))
    global_scale, groups = layer.qparams["global_scale"], weight.view(16, 4, 16)
    costs = []
    for local in LOCALS:
        units = groups / (local / global_scale)
        # brute force
        distance = (units.abs().clamp(max=6).unsqueeze(3) - MAGNITUDES).abs()
        nearest = MAGNITUDES[distance.argmin(3)] * units.sign()
        costs.append((nearest * (local / global_scale) - groups).double().square().sum(2))
    result = (layer.weight.view(16, 4, 16) - groups).double().square().sum(2)
    best = torch.stack(costs).amin(0)
    # the best of all 126 hardly ever lies outside the octave
    assert (result <= best * (1 + 1e-5)).double().mean() > 0.95
    # the largest weight at 6 is the usual rule, at 4 the other half of "four over six"
    for reach in (6, 4):
        usual = (groups.abs().amax(2) * global_scale / reach).to(torch.float8_e4m3fn).view(
            torch.uint8
        ).long() - 1
        assert (result <= torch.stack(costs).gather(0, usual.unsqueeze(0))[0] * (1 + 1e-5)).all()


def test_rounding_loses_what_was_worked_out_for_normal_numbers() -> None:
    weight = torch.randn(512, 1024, generator=torch.Generator().manual_seed(3))
    result = quantize(weight, make_step(**PLAIN)).weight
    # amax / 6 gives 0.0090
    assert float((result - weight).square().mean()) == pytest.approx(0.0065, abs=0.0002)


def test_the_global_scale_is_float32_and_one_for_the_whole_stack(tmp_path: Path) -> None:
    source = write_model(tmp_path / "m")
    compress(
        source, tmp_path / "o", scheme="nvfp4", settings=["activations=float", "algorithm=rtn"]
    )
    before, after = tensors_of(source), tensors_of(tmp_path / "o")
    for stack in (["q_proj", "k_proj", "v_proj"], ["o_proj"]):
        names = [f"model.layers.0.self_attn.{name}" for name in stack]
        amax = max(float(before[f"{name}.weight"].abs().max()) for name in names)
        for name in names:
            assert after[f"{name}.weight_global_scale"].item() == pytest.approx(
                256 * 6 / amax, rel=1e-6
            )


def inputs(tokens: int = 2000, width: int = 256) -> torch.Tensor:
    """(tokens, in): correlated channels, one channel in sixteen larger than the others."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, width, generator=generator)
    x = x + 0.5 * torch.randn(tokens, 8, generator=generator) @ torch.randn(
        8, width, generator=generator
    )
    x[:, ::16] *= 6
    return x


def observe(step: Step, x: torch.Tensor, weight: torch.Tensor) -> dict[str, Statistic]:
    return dict(
        step.call(
            "observe", inputs=x, reference=x, residual=None, output_gradient=None, weight=weight
        )
        or {}
    )


@pytest.mark.parametrize("largest", MAGNITUDES[1:].tolist())
def test_numbers_of_mxfp4_stay_as_they_are(largest: float) -> None:
    generator = torch.Generator().manual_seed(1)
    numbers = MAGNITUDES[largest >= MAGNITUDES]
    numbers = torch.cat([numbers, -numbers])
    chosen = numbers[torch.randint(len(numbers), (64, 8, 32), generator=generator)]
    # up to 2^15 apart
    exponents = torch.randint(-20, -4, (64, 8, 1), generator=generator)
    weight = (chosen * torch.exp2(exponents.float())).flatten(1)
    assert torch.equal(quantize(weight, make_step(**PLAIN)).weight, weight)


@pytest.mark.parametrize("activations", ["quantized", "float"])
def test_error_feedback_beats_rounding(activations: str) -> None:
    weight, x = numbers(96, 256) * 0.02, inputs()

    def error(algorithm: str) -> float:
        step = make_step(activations=activations, algorithm=algorithm)
        result = quantize(weight, step, observe(step, x, weight)).weight
        return float(((result - weight) @ x.T).norm() / (weight @ x.T).norm())

    assert error("gptq") < 0.75 * error("rtn")


def test_the_inputs_global_scale_reaches_the_largest_that_was_seen() -> None:
    step, weight = make_step(algorithm="rtn"), numbers(8, 32)
    stats = observe(step, torch.linspace(-5, 3, 64).view(2, 32), weight)
    assert store(quantize(weight, step, stats), step).tensors[
        "input_global_scale"
    ].item() == pytest.approx(2688 / 5)


def test_a_layer_without_data_takes_inputs_up_to_2688() -> None:
    step = make_step()
    assert store(quantize(numbers(8, 32), step), step).tensors["input_global_scale"].item() == 1.0


def round_with_compressed_tensors(x: torch.Tensor, global_scale: torch.Tensor) -> torch.Tensor:
    arguments = QuantizationArgs(**FP4, dynamic="local")
    groups = x.view(len(x), -1, 16)
    scale, zero = calculate_qparams(
        groups.amin(2), groups.amax(2), arguments, global_scale=global_scale
    )
    return fake_quantize(x, scale, zero, arguments, global_scale=global_scale)


@pytest.mark.parametrize("global_scale", [1.0, 100.0, 0.37])
def test_inputs_are_rounded_as_compressed_tensors_rounds_them(global_scale: float) -> None:
    x = numbers(64, 64, spread=2)
    # a token of zeros, and groups below the least scale
    x[3], x[:, 16:32] = 0, x[:, 16:32] / 1e6
    stored = store(quantize(numbers(8, 64), step := make_step(algorithm="rtn")), step)
    tensors = {**stored.tensors, "input_global_scale": torch.tensor([global_scale])}
    rounded = find_activation_quantizer(tensors, stored.config, [step])(x)
    assert torch.equal(rounded, round_with_compressed_tensors(x, torch.tensor([global_scale])))


def test_weights_are_not_fitted_to_what_rounding_takes_from_inputs() -> None:
    x = numbers(64, 32) * 7
    stats = make_step().call(
        "observe",
        inputs=x,
        reference=x,
        residual=None,
        output_gradient=None,
        weight=numbers(8, 32),
    )
    torch.testing.assert_close(stats["hessian"].value, x.T @ x)
    assert not stats["cross_moment"].value.any()


@pytest.mark.parametrize(
    ("options", "calibrated"),
    [({}, True), ({"algorithm": "rtn"}, True), ({"activations": "float"}, True), (PLAIN, False)],
)
def test_only_plain_rounding_of_weights_alone_needs_no_data(
    options: dict[str, str], calibrated: bool
) -> None:
    assert make_step(**options).calibrated == calibrated


def test_another_group_size_is_refused_saying_why(tmp_path: Path) -> None:
    line = refusal(
        "plan", write_model(tmp_path / "m"), "--scheme", "nvfp4", "--set", "group_size=32"
    )
    assert "group_size 32: NVFP4 has a scale for every 16 numbers, by definition" in line


def test_a_width_that_does_not_divide_is_refused_naming_the_way_out(tmp_path: Path) -> None:
    line = refusal(
        "plan",
        write_model(tmp_path / "m", config=LLAMA | {"intermediate_size": 200}),
        "--scheme",
        "nvfp4",
    )
    assert "model.layers.0.mlp.down_proj: width 200 is not a multiple of 16" in line
    assert "--ignore '*.down_proj'" in line


@pytest.mark.parametrize(
    ("options", "device", "level", "words"),
    [
        ({}, "B200", "recommended", "FP4 tensor cores"),
        ({}, "RTX 5090", "recommended", "FP4 tensor cores"),
        ({"activations": "float"}, "B200", "supported", "activations=quantized"),
        ({}, "H100", "degraded", "16 bits"),
        ({"activations": "float"}, "H100", "supported", "Marlin"),
        ({}, "T4", "degraded", "Marlin"),
        ({}, "V100", "unsupported", "7.5"),
        ({}, "MI300X", "degraded", "emulates"),
        ({"activations": "float"}, "MI300X", "unsupported", "w4a16"),
        ({}, "CPU x86", "unsupported", "w4a16"),
    ],
)
def test_hardware_is_judged_by_what_its_engine_runs(
    options: dict[str, str], device: str, level: str, words: str
) -> None:
    finding = make_step(**options).call("validate_hardware", hardware=find_device(device))[0]
    assert finding.level == level
    assert words in finding.text
