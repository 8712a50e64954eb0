"""Steps joined by `+`: whatever is pruned first stays zero through every quantizing scheme, and
nothing is corrected twice.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.learner_scheme import runnable_model
from hypothesis import given, settings, strategies as st

from bitpress import compress
from bitpress.checkpoint.reader import open_checkpoint
from bitpress.conformance.commands import command, refusal
from bitpress.conformance.models import LLAMA, tensors_of, write_model
from bitpress.planning.recipe import from_scheme
from bitpress.schemes import pipeline, stored_layout
from bitpress.schemes.registry import Step, discover
from bitpress.schemes.values import Layer, Statistic

PRUNING = {
    "2:4": ("sparse-2of4", {}),
    "2:4 by wanda": ("sparse-2of4", {"algorithm": "wanda"}),
    "2:4 by magnitude": ("sparse-2of4", {"algorithm": "magnitude"}),
    "half": ("sparse", {}),
    "a third, with data": ("sparse", {"algorithm": "sparsegpt", "sparsity": 1 / 3}),
}
QUANTIZING = {
    "fp8": ("fp8", {}),
    "fp8 per tensor": ("fp8", {"weights": "tensor"}),
    "fp8-block": ("fp8-block", {}),
    "int8": ("int8", {}),
    "int8 rounded": ("int8", {"algorithm": "rtn"}),
    "int8 per tensor": ("int8", {"weights": "tensor"}),
    "w4a16": ("w4a16", {}),
    "w4a16 asymmetric": ("w4a16", {"symmetric": False, "group_size": 32}),
    "w4a16 by awq": ("w4a16", {"algorithm": "awq", "group_size": "channel"}),
    "w4a16 rounded": ("w4a16", {"algorithm": "rtn", "group_size": 64}),
    "w8a16": ("w8a16", {"algorithm": "gptq"}),
}
WIDTH = 128


def steps(first: str, second: str | None = None) -> tuple[Step, ...]:
    names = [PRUNING[first], *([QUANTIZING[second]] if second else [])]
    return tuple(discover().get(name).step(options) for name, options in names)


def inputs(moved: float = 0.0, tokens: int = 1500) -> torch.Tensor:
    """(tokens, in): alike in parts, unlike in size, and how compressed layers before may have moved
    them.
    """
    generator = torch.Generator().manual_seed(1)
    x = (
        torch.randn(tokens, WIDTH, generator=generator)
        * (torch.randn(WIDTH, generator=generator) * 0.5).exp()
    )
    x = x + 0.5 * x @ torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5
    return x + moved * x.roll(1, 1)


def weights(rows: int, seed: int) -> torch.Tensor:
    return (
        (torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed)) * 0.02)
        .bfloat16()
        .float()
    )


def collect_statistics(
    used: tuple[Step, ...], weight: torch.Tensor, moved: float
) -> list[dict[str, Statistic]]:
    """Every step's statistics, as a run takes them: of the source's weight, all at once."""
    shifted, before = inputs(moved), inputs()
    collected = [
        pipeline.observe(s, weight, shifted, before) if s.calibrated else None for s in used
    ]
    return [dict(stats or {}) for stats in collected]


def result(used: tuple[Step, ...], weight: torch.Tensor, moved: float = 0.2) -> Layer:
    return pipeline.quantize_whole(
        Layer("layer", weight, torch.bfloat16), used, collect_statistics(used, weight, moved)
    )


def missing(weight: torch.Tensor, collected: torch.Tensor, moved: float = 0.2) -> float:
    """||W x - Q x̃|| / ||W x||: what a layer's output lacks."""
    expected = inputs() @ weight.T
    return float((expected - inputs(moved) @ collected.T).norm() / expected.norm())


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    st.sampled_from(list(PRUNING)),
    st.sampled_from(list(QUANTIZING)),
    st.integers(1, 5),
    st.integers(0, 1000),
)
def test_what_is_pruned_stays_zero_and_what_is_stored_comes_back(
    first: str, second: str, blocks: int, seed: int
) -> None:
    used, weight = steps(first, second), weights(8 * blocks, seed)
    pruned, layer = result(used[:1], weight), result(used, weight)
    assert torch.equal(layer.mask, pruned.mask)
    assert not layer.weight[~pruned.mask].any()
    assert list(pipeline.validate_weight(layer.weight, used)) == []
    record = pipeline.serialize(
        pipeline.join([pipeline.pack(layer, used)], tuple(weight.shape)), used
    )
    restored = pipeline.dequantize(record.tensors, record.config, used)
    assert torch.equal(restored, layer.weight)
    assert not torch.signbit(restored[~pruned.mask]).any()
    planned = stored_layout.describe(*weight.shape, torch.bfloat16, used)
    assert record.config == planned.config
    shapes = {name: (tensor.dtype, tensor.shape) for name, tensor in record.tensors.items()}
    assert shapes == {
        name: (tensor.dtype, tensor.shape) for name, tensor in planned.tensors.items()
    }


def rounded(second: str, weight: torch.Tensor) -> float:
    """What is missing after the quantizing step alone."""
    name, options = QUANTIZING[second]
    return missing(weight, result((discover().get(name).step(options),), weight).weight)


@pytest.mark.parametrize("first", ["2:4", "2:4 by wanda", "a third, with data"])
@pytest.mark.parametrize("second", ["fp8", "int8", "w8a16", "w4a16"])
def test_rounding_afterwards_adds_its_own_error_and_no_other(first: str, second: str) -> None:
    weight = weights(64, 3)
    alone, both = (missing(weight, result(steps(first, s), weight).weight) for s in (None, second))
    assert both**2 < alone**2 + 1.5 * rounded(second, weight) ** 2
    if second in ("int8", "w8a16"):
        assert both < 1.01 * alone


@pytest.mark.parametrize("second", ["fp8", "fp8 per tensor"])
def test_after_a_step_with_data_rounding_errors_are_fed_forward_by_a_scheme_that_asks_for_none(
    second: str,
) -> None:
    weight, used = weights(64, 3), steps("2:4", second)
    pruned = result(used[:1], weight)
    rounded = pipeline.quantize_whole(pruned, used[1:], [{}])
    pruned_loss, plain, fed = (
        missing(weight, layer.weight) ** 2 for layer in (pruned, rounded, result(used, weight))
    )
    assert fed - pruned_loss < 0.9 * (plain - pruned_loss)


@pytest.mark.parametrize("second", ["int8", "w8a16", "w4a16"])
def test_a_step_with_data_makes_up_for_one_without(second: str) -> None:
    weight = weights(64, 3)
    alone, both = (
        missing(weight, result(steps("2:4 by magnitude", s), weight).weight) for s in (None, second)
    )
    assert both < 0.8 * alone


@pytest.mark.parametrize("order", ["w4a16+sparse", "fp8+sparse-2of4", "int8+fp8"])
def test_nothing_follows_a_step_that_stores_codes(tmp_path: Path, order: str) -> None:
    line = refusal("plan", write_model(tmp_path / "m"), "--scheme", order)
    assert f"{order.partition('+')[2]} cannot follow a step that stores codes already" in line


# --- whole runs
# ----------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["sparse-2of4+fp8", "sparse-2of4+int8", "sparse+w4a16"])
def test_a_calibrated_composition_is_proved_against_its_source(tmp_path: Path, scheme: str) -> None:
    source, text = runnable_model(tmp_path / "m"), tmp_path / "text.txt"
    compress(
        source,
        tmp_path / "o",
        scheme=scheme,
        calibration=text,
        samples=32,
        sequence_length=48,
        threads=1,
    )
    assert command("verify", tmp_path / "o", "--against", source).returncode == 0
    manifest = json.loads(command("inspect", tmp_path / "o", "--json").stdout)
    assert {tuple(layer["steps"]) for layer in manifest["layers"].values()} == {
        tuple(scheme.split("+"))
    }
    used = from_scheme(scheme, discover()).rules[0].steps
    names, config = (
        tensors_of(tmp_path / "o"),
        json.loads((tmp_path / "o/config.json").read_text())["quantization_config"],
    )
    group = {
        key: value for key, value in config["config_groups"]["group_0"].items() if key != "targets"
    }
    layer = "model.layers.1.mlp.up_proj"
    tensors = {
        name.removeprefix(f"{layer}."): tensor
        for name, tensor in names.items()
        if name.startswith(f"{layer}.")
    }
    zeros = pipeline.dequantize(tensors, group, used) == 0
    assert (zeros.sum(1) >= zeros.shape[1] // 2).all()
    # it names no layers: engines refuse a config that does
    assert "targets" not in config.get("sparsity_config", {})


MIXED = """
[[layers]]
match = "*.layers.0.mlp.*"
steps = [{ use = "sparse-2of4", algorithm = "magnitude" }]
[[layers]]
match = "*.self_attn.*"
steps = ["fp8"]
[[layers]]
match = "*.down_proj"
steps = []
[[layers]]
match = "*.mlp.*"
steps = ["sparse", { use = "w4a16", algorithm = "rtn" }]
"""


def test_a_mixed_recipe_names_every_group_and_ignores_the_rest_by_full_path(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(MIXED)
    source = write_model(tmp_path / "m", config=LLAMA | {"num_hidden_layers": 3})
    compress(source, tmp_path / "o", recipe=tmp_path / "recipe.toml")
    config = open_checkpoint(tmp_path / "o").config["quantization_config"]
    attention = [f"model.layers.{i}.self_attn.{n}_proj" for i in range(3) for n in "qkvo"]
    mlp = [f"model.layers.{i}.mlp.{n}_proj" for i in (1, 2) for n in ("gate", "up")]
    first = [f"model.layers.0.mlp.{n}_proj" for n in ("gate", "up", "down")]
    assert config["format"] == "mixed-precision"
    groups = {group["format"]: group for group in config["config_groups"].values()}
    assert sorted(groups["float-quantized"]["targets"]) == sorted(attention)
    assert sorted(groups["pack-quantized"]["targets"]) == sorted(mlp)
    alone = [f"model.layers.{i}.mlp.down_proj" for i in (1, 2)]
    assert sorted(config["ignore"]) == sorted(["lm_head", *alone, *first])
    assert command("verify", tmp_path / "o", "--against", source).returncode == 0
    assert command("decompress", tmp_path / "o", tmp_path / "dense").returncode == 0
    assert tensors_of(tmp_path / "dense").keys() == tensors_of(source).keys()


def test_a_bitmask_beside_a_quantized_group_names_its_layers(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(
        '[[layers]]\nmatch = "*.mlp.*"\nsteps = [{ use = "sparse", layout = "bitmask" }]\n'
        '[[layers]]\nmatch = "*"\nsteps = ["fp8"]\n'
    )
    source = write_model(tmp_path / "m")
    compress(source, tmp_path / "o", recipe=tmp_path / "recipe.toml")
    config: dict[str, Any] = open_checkpoint(tmp_path / "o").config["quantization_config"]
    mlp = sorted(f"model.layers.{i}.mlp.{n}_proj" for i in (0, 1) for n in ("gate", "up", "down"))
    assert sorted(config["sparsity_config"]["targets"]) == mlp
    assert sorted(config["config_groups"]["group_0"]["targets"]) == mlp
    assert command("verify", tmp_path / "o", "--against", source).returncode == 0
