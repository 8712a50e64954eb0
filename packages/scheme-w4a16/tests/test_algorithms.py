"""Which data an algorithm looks at, and what it makes of it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from bitpress.conformance.commands import command, refusal
from bitpress.conformance.models import LLAMA, write_model
from bitpress.schemes import pipeline
from bitpress.schemes.hardware import find_device
from bitpress.schemes.registry import Step, discover
from bitpress.schemes.values import Layer, Statistic

WIDTH = 256


def make_step(name: str = "w4a16", **options: Any) -> Step:
    return discover().get(name).step(options)


def weights(rows: int = 96) -> torch.Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(0)) * 0.02


def inputs(salient: float = 1.0) -> torch.Tensor:
    """(tokens, in): correlated channels, one channel in sixteen is larger than the others by
    `salient`.
    """
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2000, WIDTH, generator=generator)
    x = x + 0.5 * torch.randn(2000, 8, generator=generator) @ torch.randn(
        8, WIDTH, generator=generator
    )
    x[:, ::16] *= salient
    return x


def error(
    step: Step, weight: torch.Tensor, x: torch.Tensor, factors: torch.Tensor | None = None
) -> float:
    """||x (W - Q)ᵀ|| / ||x Wᵀ||, inputs divided by the factors and columns multiplied."""
    s = torch.ones(WIDTH) if factors is None else factors
    stats = (
        step.call(
            "observe",
            inputs=x / s,
            reference=None,
            residual=None,
            output_gradient=None,
            weight=weight * s,
        )
        or {}
    )
    result = pipeline.quantize(Layer("layer", weight * s, torch.bfloat16), [step], [stats]).weight
    return float(((x / s) @ result.T - x @ weight.T).norm() / (x @ weight.T).norm())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", ["w4a16", "w8a16"])
def test_error_feedback_beats_rounding_and_a_weighted_grid_lies_between(
    name: str, symmetric: bool
) -> None:
    weight, x = weights(), inputs(salient=6)
    gptq, awq, rtn = (
        error(make_step(name, algorithm=a, symmetric=symmetric), weight, x)
        for a in ("gptq", "awq", "rtn")
    )
    assert gptq < awq <= rtn


def test_zero_points_and_smaller_groups_lose_less() -> None:
    weight, x = weights(), inputs()
    plain = error(make_step(), weight, x)
    assert error(make_step(symmetric=False), weight, x) < plain
    assert (
        error(make_step(group_size=32), weight, x)
        < error(make_step(group_size=64), weight, x)
        < plain
    )
    assert error(make_step(group_size="channel"), weight, x) > plain


def test_awq_s_factors_make_salient_channels_finer() -> None:
    weight, x = weights(), inputs(salient=20)
    step = make_step(algorithm="awq")
    stats = step.call(
        "observe", inputs=x, reference=None, residual=None, output_gradient=None, weight=weight
    )
    factors = step.call("rescale", layer=Layer("layer", weight, torch.bfloat16), stats=stats)
    assert factors[::16].min() > factors[1::16].max()
    scaled, unscaled, plain = (
        error(step, weight, x, factors),
        error(step, weight, x),
        error(make_step(algorithm="rtn"), weight, x),
    )
    assert scaled < unscaled < 0.8 * plain


def test_awq_leaves_channels_alone_that_are_alike() -> None:
    step, x = (
        make_step(algorithm="awq"),
        torch.randn(3000, WIDTH, generator=torch.Generator().manual_seed(2)),
    )
    stats = step.call(
        "observe", inputs=x, reference=None, residual=None, output_gradient=None, weight=weights()
    )
    factors = step.call("rescale", layer=Layer("layer", weights(), torch.bfloat16), stats=stats)
    # the core rounds factors to eighths of octaves
    assert factors is None or float(factors.log2().abs().max()) < 1 / 16


@pytest.mark.parametrize("bad", [torch.nan, 0.0])
def test_awq_without_usable_statistics_says_so_and_rounds(bad: float) -> None:
    step = make_step(algorithm="awq")
    stats = {
        "hessian": Statistic(torch.full((WIDTH, WIDTH), bad), "sum"),
        "tokens": Statistic(torch.tensor(9.0), "sum"),
    }
    layer = Layer("layer", weights(), torch.bfloat16)
    with pytest.warns(UserWarning, match="rounded without them"):
        result = pipeline.quantize(layer, [step], [stats]).weight
    assert torch.equal(result, pipeline.quantize(layer, [make_step(algorithm="rtn")], [{}]).weight)


@pytest.mark.parametrize(
    ("name", "options", "calibrated", "rescales"),
    [
        ("w4a16", {}, True, False),
        ("w4a16", {"algorithm": "awq"}, True, True),
        ("w4a16", {"algorithm": "rtn"}, False, False),
        ("w8a16", {}, False, False),
        ("w8a16", {"activations": "int16"}, True, False),
        ("w8a16", {"algorithm": "gptq"}, True, False),
    ],
)
def test_only_rounding_of_weights_needs_no_data(
    name: str, options: dict[str, str], calibrated: bool, rescales: bool
) -> None:
    step = make_step(name, **options)
    assert (step.calibrated, step.rescales) == (calibrated, rescales)


@pytest.mark.parametrize(("width", "group"), [(256, 128), (192, 64), (96, 32), (80, "channel")])
def test_auto_takes_the_largest_group_that_fits_and_says_so_where_it_is_not_128(
    width: int, group: int | str
) -> None:
    step, layer = (
        make_step(group_size="auto", algorithm="rtn"),
        Layer("layer", torch.ones(8, width), torch.bfloat16),
    )
    with warnings.catch_warnings(record=True) as messages:
        warnings.simplefilter("always")
        stored = pipeline.serialize(
            pipeline.pack(pipeline.quantize(layer, [step], [{}]), [step]), [step]
        )
    expected = (
        {"strategy": "channel"}
        if group == "channel"
        else {"strategy": "group", "group_size": group}
    )
    assert expected.items() <= stored.config["weights"].items()
    assert [str(t.message) for t in messages] == (
        [] if group == 128 else [f"group_size=auto: {group}, as {width} columns need it"]
    )


def test_a_width_that_does_not_divide_is_refused_at_plan_time_naming_what_fits(
    tmp_path: Path,
) -> None:
    model = write_model(tmp_path / "m", config=LLAMA | {"intermediate_size": 192})
    line = refusal("plan", model, "--scheme", "w4a16")
    for words in (
        "model.layers.0.mlp.down_proj",
        "width 192 is not a multiple of group_size 128",
        "group_size=64",
        "group_size=32",
        "group_size=channel",
        "group_size=auto",
        "--ignore '*.down_proj'",
    ):
        assert words in line, line
    for size in ("64", "32", "channel", "auto"):
        assert (
            command("plan", model, "--scheme", "w4a16", "--set", f"group_size={size}").returncode
            == 0
        )


def test_fused_rows_that_do_not_fill_words_of_zero_points_are_refused(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m", config=LLAMA | {"intermediate_size": 132})
    settings = ["--set", "group_size=channel", "--set", "symmetric=false"]
    line = refusal("plan", model, "--scheme", "w4a16", *settings)
    assert "132 rows are not a multiple of 8" in line
    assert command("plan", model, "--scheme", "w8a16", *settings).returncode == 0


@pytest.mark.parametrize(
    ("name", "options", "device", "level"),
    [
        ("w4a16", {}, "H100", "recommended"),
        ("w4a16", {"symmetric": False}, "A100", "recommended"),
        ("w4a16", {}, "T4", "recommended"),
        ("w4a16", {}, "V100", "unsupported"),
        ("w4a16", {}, "MI300X", "supported"),
        ("w4a16", {}, "CPU x86", "recommended"),
        ("w4a16", {}, "Google TPU", "supported"),
        ("w8a16", {}, "H100", "recommended"),
        ("w8a16", {"symmetric": False}, "H100", "degraded"),
        ("w8a16", {}, "CPU x86", "unsupported"),
        ("w8a16", {"activations": "int16"}, "H100", "unsupported"),
    ],
)
def test_hardware_is_judged_by_what_its_engine_runs(
    name: str, options: dict, device: str, level: str
) -> None:
    assert (
        make_step(name, **options).call("validate_hardware", hardware=find_device(device))[0].level
        == level
    )
