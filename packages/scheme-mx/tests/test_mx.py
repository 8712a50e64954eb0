"""What `mxfp4` and `mxfp8` store, against compressed-tensors' own reading and brute force; and what
their algorithms reach.
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
from bitpress.errors import ShapeError
from bitpress.schemes import pipeline
from bitpress.schemes.activation_quantizer import find_activation_quantizer
from bitpress.schemes.hardware import find_device
from bitpress.schemes.registry import Step, discover
from bitpress.schemes.values import Layer, Statistic, StoredLayer
from bitpress_mx import elements

BITS = {"mxfp4": 4, "mxfp8": 8}
FORMATS = {"mxfp4": "mxfp4-pack-quantized", "mxfp8": "mxfp8-quantized"}
# every number of the elements that is not negative
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
E4M3 = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
NUMBERS = {"mxfp4": E2M1, "mxfp8": E4M3}


def arguments(scheme: str) -> dict[str, Any]:
    return {
        "num_bits": BITS[scheme],
        "type": "float",
        "symmetric": True,
        "strategy": "group",
        "group_size": 32,
        "scale_dtype": "torch.uint8",
    }


def make_step(scheme: str, **options: Any) -> Step:
    return discover().get(scheme).step(options)


def numbers(rows: int, columns: int, seed: int = 0, spread: float = 0.0) -> torch.Tensor:
    """Groups of 32 differ by factors of up to 10^spread either way."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 10 ** (spread * (2 * torch.rand(rows, columns // 32, 1, generator=generator) - 1))
    grouped = torch.randn(rows, columns // 32, 32, generator=generator) * sizes
    return grouped.view(rows, -1).bfloat16().float()


def quantize(weight: torch.Tensor, step: Step, stats: dict[str, Statistic] | None = None) -> Layer:
    layer = Layer("layer", weight, torch.bfloat16)
    return pipeline.quantize_whole(layer, [step], [stats or {}])


def store(layer: Layer, step: Step) -> StoredLayer:
    return pipeline.serialize(pipeline.pack(layer, [step]), [step])


def decode_with_compressed_tensors(stored: StoredLayer) -> torch.Tensor:
    """The weight as compressed-tensors decodes it, which is in bfloat16."""
    group = {"targets": ["Linear"], **stored.config}
    config = {
        "quant_method": "compressed-tensors",
        "format": group.pop("format"),
        "config_groups": {"group_0": group},
        "quantization_status": "compressed",
    }
    parsed = QuantizationConfig.model_validate(config).config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(stored.config["format"])
    return compressor.decompress(dict(stored.tensors), parsed)["weight"]


AWKWARD = {
    "normal": lambda w: w,
    "a group of zeros": lambda w: w * (torch.arange(w.shape[1]) >= 32),
    "all zeros": lambda w: w * 0,
    "tiny": lambda w: w * 2.0**-100,
    "denormal": lambda w: (w * 2.0**-131).bfloat16().float(),
    "huge": lambda w: w.sign() * torch.finfo(torch.bfloat16).max,
    "one outlier": lambda w: w + 1e4 * (torch.arange(w.numel()) == 5).view_as(w),
}


@settings(derandomize=True, deadline=None, max_examples=100)
@given(
    st.sampled_from(sorted(BITS)),
    st.sampled_from(sorted(AWKWARD)),
    st.integers(1, 20),
    st.integers(1, 5),
    st.integers(0, 1000),
    st.sampled_from([0, 2, 12]),
)
def test_what_is_stored_is_decoded_exactly(  # noqa: PLR0913, PLR0917
    scheme: str, kind: str, rows: int, groups: int, seed: int, spread: float
) -> None:
    step = make_step(scheme, algorithm="rtn")
    layer = quantize(AWKWARD[kind](numbers(rows, 32 * groups, seed, spread)), step)
    stored = store(layer, step)
    assert torch.equal(pipeline.dequantize(stored.tensors, stored.config, [step]), layer.weight)
    assert torch.equal(decode_with_compressed_tensors(stored), layer.weight.bfloat16())
    assert layer.weight.isfinite().all()
    # neither 2^-127, which is subnormal in float32, nor NaN
    scales = stored.tensors["weight_scale"]
    assert scales.amin() > 0
    assert scales.amax() < 255


@pytest.mark.parametrize("code", [0, 1, 127, 254])
@pytest.mark.parametrize("scheme", BITS)
def test_every_scale_that_others_may_write_is_read(scheme: str, code: int) -> None:
    step = make_step(scheme, algorithm="rtn")
    stored = store(quantize(numbers(4, 32), step), step)
    stored.tensors["weight_scale"].fill_(code)
    decoded = pipeline.dequantize(stored.tensors, stored.config, [step])
    assert torch.equal(decode_with_compressed_tensors(stored), decoded.bfloat16())


@pytest.mark.parametrize("scheme", BITS)
def test_the_nan_code_is_read_as_nan(scheme: str) -> None:
    step = make_step(scheme, algorithm="rtn")
    stored = store(quantize(numbers(4, 32), step), step)
    stored.tensors["weight_scale"].fill_(255)
    assert pipeline.dequantize(stored.tensors, stored.config, [step]).isnan().all()


@pytest.mark.parametrize(
    ("scheme", "kind", "share"),
    [
        ("mxfp4", "normal", 0.13),
        ("mxfp4", "tiny", 0.13),
        ("mxfp8", "normal", 0.03),
        ("mxfp8", "tiny", 0.03),
        ("mxfp8", "denormal", 0.03),
        # greater numbers than 1.5 and 1.75 times 2^127 are infinite in float32 with these elements
        ("mxfp4", "huge", 0.25),
        ("mxfp8", "huge", 0.125),
    ],
)
def test_numbers_of_any_size_lose_little(scheme: str, kind: str, share: float) -> None:
    weight = AWKWARD[kind](numbers(8, 64))
    result = quantize(weight, make_step(scheme, algorithm="rtn")).weight
    assert (result - weight).double().norm() < share * weight.double().norm()


def test_two_codes_lie_in_a_byte_the_even_column_in_its_low_half() -> None:
    row = torch.cat([E2M1, -E2M1, E2M1, -E2M1]).unsqueeze(0)
    step = make_step("mxfp4", algorithm="rtn")
    layer = quantize(row, step)
    # all of them are representable
    assert torch.equal(layer.weight, row)
    table = [*E2M1.tolist(), *(-E2M1).tolist()]
    codes = [table.index(number) for number in row.flatten().tolist()]
    stored = store(layer, step)
    packed = stored.tensors["weight_packed"].flatten().tolist()
    assert packed == [low | high << 4 for low, high in zip(codes[::2], codes[1::2], strict=True)]
    assert stored.tensors["weight_scale"].tolist() == [[127]]


@pytest.mark.parametrize("rounds_inputs", [True, False])
@pytest.mark.parametrize("scheme", BITS)
def test_the_stored_layer_is_what_compressed_tensors_expects(
    scheme: str, rounds_inputs: bool
) -> None:
    activations = "quantized" if rounds_inputs else "float"
    step = make_step(scheme, activations=activations, algorithm="rtn")
    stored = store(quantize(numbers(24, 64), step), step)
    codes = {
        "mxfp4": {"weight_packed": (torch.uint8, (24, 32))},
        "mxfp8": {"weight": (torch.float8_e4m3fn, (24, 64))},
    }
    assert {n: (t.dtype, tuple(t.shape)) for n, t in stored.tensors.items()} == {
        **codes[scheme],
        "weight_scale": (torch.uint8, (24, 2)),
    }
    assert stored.config == {
        "format": FORMATS[scheme],
        "weights": arguments(scheme) | {"dynamic": False},
        "input_activations": arguments(scheme) | {"dynamic": True} if rounds_inputs else None,
    }


def least_costs(
    weight: torch.Tensor, scheme: str, importance: torch.Tensor | None = None
) -> torch.Tensor:
    """What each group costs with the best of all powers of two: brute force in float64."""
    groups = weight.double().view(len(weight), -1, 32)
    costs = []
    for exponent in range(-24, 24):
        units = groups / 2.0**exponent
        table = NUMBERS[scheme].double()
        nearest = table[(units.abs().unsqueeze(3) - table).abs().argmin(3)] * units.sign()
        error = ((nearest - units) * 2.0**exponent).square()
        if importance is not None:
            error *= importance.double().view(1, -1, 32)
        costs.append(error.sum(2))
    return torch.stack(costs).amin(0)


@pytest.mark.parametrize("spread", [0, 1])
@pytest.mark.parametrize("scheme", BITS)
def test_a_group_s_scale_is_the_best_power_of_two(scheme: str, spread: float) -> None:
    weight = numbers(64, 128, spread=spread)
    result = quantize(weight, make_step(scheme, algorithm="rtn")).weight
    cost = (result - weight).double().square().view(64, -1, 32).sum(2)
    best = least_costs(weight, scheme)
    # a search by places of the span may take the second of two that are nearly equal
    assert (cost <= best * 1.002).all()
    assert (cost <= best * (1 + 1e-9)).double().mean() > 0.99


def test_a_column_that_matters_takes_the_scale_away_from_the_largest_weight() -> None:
    weight = numbers(64, 64)
    weight[:, 7] *= 3
    importance = torch.ones(64)
    importance[7] = 1e-4
    grid = elements.fit(weight, importance, 4)
    cost = ((grid.rounded(weight) - weight).double().square() * importance).view(64, 2, 32).sum(2)
    best = least_costs(weight, "mxfp4", importance)
    assert (cost <= best * 1.002).double().mean() > 0.95
    assert (grid.scale[:, 0] < elements.fit(weight, None, 4).scale[:, 0]).any()


def test_of_equal_scales_the_largest_is_taken() -> None:
    # 4 is a number with 1, with 2 and, halved, with 4 as scale; so are zeros
    weight = torch.tensor([[4.0] + [0.0] * 31])
    layer = quantize(weight, make_step("mxfp4", algorithm="rtn"))
    assert layer.qparams["scale"].tolist() == [[2.0]]


def test_eight_bits_clip_no_weight_by_more_than_rounding_moves_it() -> None:
    for largest, scale in [(448.0, 1.0), (463.0, 1.0), (464.0, 2.0), (512.0, 2.0)]:
        weight = torch.tensor([[largest] + [1.0] * 31])
        layer = quantize(weight, make_step("mxfp8"))
        assert layer.qparams["scale"].item() == scale
        assert abs(layer.weight[0, 0].item() - largest) <= 16


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


@pytest.mark.parametrize("activations", ["quantized", "float"])
@pytest.mark.parametrize("scheme", BITS)
def test_error_feedback_beats_rounding(scheme: str, activations: str) -> None:
    weight, x = numbers(96, 256) * 0.02, inputs()

    def error(algorithm: str) -> float:
        step = make_step(scheme, activations=activations, algorithm=algorithm)
        result = quantize(weight, step, observe(step, x, weight)).weight
        return float(((result - weight) @ x.T).norm() / (weight @ x.T).norm())

    assert error("gptq") < 0.75 * error("rtn")


def round_with_compressed_tensors(x: torch.Tensor, scheme: str) -> torch.Tensor:
    args = QuantizationArgs(**arguments(scheme), dynamic=True)
    groups = x.view(len(x), -1, 32)
    scale, zero = calculate_qparams(groups.amin(2), groups.amax(2), args)
    return fake_quantize(x, scale, zero, args)


@pytest.mark.parametrize("spread", [0, 2, 8])
@pytest.mark.parametrize("scheme", BITS)
def test_inputs_are_rounded_as_compressed_tensors_rounds_them(scheme: str, spread: float) -> None:
    x = numbers(256, 64, spread=spread)
    # a token of zeros, and largest magnitudes of 1.75 times a power of two
    x[3], x[5, 0], x[6, 32] = 0, 7.0, -1792.0
    step = make_step(scheme, algorithm="rtn")
    stored = store(quantize(numbers(8, 64), step), step)
    rounded = find_activation_quantizer(stored.tensors, stored.config, [step])(x)
    assert torch.equal(rounded, round_with_compressed_tensors(x, scheme))


@pytest.mark.parametrize("scheme", BITS)
def test_inputs_stay_as_they_are_where_weights_alone_are_quantized(scheme: str) -> None:
    step = make_step(scheme, activations="float", algorithm="rtn")
    stored = store(quantize(numbers(8, 64), step), step)
    assert find_activation_quantizer(stored.tensors, stored.config, [step]) is None


@pytest.mark.parametrize("scheme", BITS)
def test_weights_are_not_fitted_to_what_rounding_takes_from_inputs(scheme: str) -> None:
    x = numbers(64, 32) * 7
    stats = observe(make_step(scheme, algorithm="gptq"), x, numbers(8, 32))
    torch.testing.assert_close(stats["hessian"].value, x.T @ x)
    assert not stats["cross_moment"].value.any()


@pytest.mark.parametrize(
    ("scheme", "options", "calibrated"),
    [
        ("mxfp4", {}, True),
        ("mxfp4", {"activations": "float"}, True),
        ("mxfp4", {"algorithm": "rtn"}, False),
        ("mxfp8", {}, False),
        ("mxfp8", {"algorithm": "gptq"}, True),
    ],
)
def test_only_error_feedback_needs_data(
    scheme: str, options: dict[str, str], calibrated: bool
) -> None:
    assert make_step(scheme, **options).calibrated == calibrated


@pytest.mark.parametrize(("scheme", "bits"), [("mxfp4", 4.25), ("mxfp8", 8.25)])
def test_scales_take_a_quarter_of_a_bit(scheme: str, bits: float) -> None:
    step = make_step(scheme, algorithm="rtn")
    tensors = store(quantize(numbers(24, 64), step), step).tensors
    assert sum(tensor.nbytes for tensor in tensors.values()) * 8 == bits * 24 * 64


@pytest.mark.parametrize("scheme", BITS)
def test_a_width_that_does_not_divide_is_refused_naming_the_way_out(
    scheme: str, tmp_path: Path
) -> None:
    line = refusal(
        "plan",
        write_model(tmp_path / "m", config=LLAMA | {"intermediate_size": 208}),
        "--scheme",
        scheme,
    )
    assert "model.layers.0.mlp.down_proj: width 208 is not a multiple of 32" in line
    assert "--ignore '*.down_proj'" in line


def test_the_least_width_is_named_where_a_layer_is_narrower() -> None:
    with pytest.raises(ShapeError, match="as 32 is"):
        quantize(torch.zeros(2, 16), make_step("mxfp8"))


@pytest.mark.parametrize("cut", ["rows", "columns", None])
def test_a_rank_must_hold_whole_groups(cut: str | None) -> None:
    step = make_step("mxfp4")
    findings = step.call("validate_shape", shape=(48, 48), cut=cut, hardware=find_device("B200"))
    assert [finding.level for finding in findings or []] == ["unsupported"] * (cut == "columns")


@pytest.mark.parametrize(
    ("scheme", "options", "device", "level", "words"),
    [
        ("mxfp4", {}, "B200", "recommended", "MXFP4 tensor cores"),
        ("mxfp4", {}, "RTX 5090", "recommended", "FlashInfer"),
        ("mxfp4", {"activations": "float"}, "B200", "supported", "rounds activations"),
        ("mxfp4", {}, "H100", "degraded", "16 bits"),
        ("mxfp4", {"activations": "float"}, "A100", "supported", "Marlin"),
        ("mxfp4", {}, "T4", "unsupported", "8.0"),
        ("mxfp4", {}, "MI355X", "recommended", "gfx950"),
        ("mxfp4", {}, "MI300X", "degraded", "emulates"),
        ("mxfp4", {}, "Intel Data Center GPU Max", "supported", "Intel"),
        ("mxfp4", {}, "CPU x86", "unsupported", "w4a16"),
        ("mxfp8", {}, "B200", "recommended", "MXFP8 tensor cores"),
        ("mxfp8", {"activations": "float"}, "MI350X", "supported", "rounds activations"),
        ("mxfp8", {}, "T4", "degraded", "Marlin"),
        ("mxfp8", {"activations": "float"}, "H100", "supported", "Marlin"),
        ("mxfp8", {}, "V100", "unsupported", "7.5"),
        ("mxfp8", {}, "MI300X", "degraded", "16-bit"),
        ("mxfp8", {}, "CPU Arm", "unsupported", "int8"),
    ],
)
def test_hardware_is_judged_by_what_its_engine_runs(
    scheme: str, options: dict[str, str], device: str, level: str, words: str
) -> None:
    finding = make_step(scheme, **options).call("validate_hardware", hardware=find_device(device))
    assert finding[0].level == level
    assert words in finding[0].text
