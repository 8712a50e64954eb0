"""What is stored, and that it comes back: in memory, and by the commands as users run them."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file

from bitpress.conformance.commands import command, install, refusal
from bitpress.conformance.models import LLAMA, files_of, tensors_of, write_model
from bitpress.schemes import pipeline
from bitpress.schemes.hardware import find_device
from bitpress.schemes.registry import Step, discover
from bitpress.schemes.values import Layer, StoredLayer
from bitpress_sparse import bitmask

SCHEMES = ("sparse-2of4", "sparse")
LAYER = "model.layers.1.mlp.up_proj"


def make_step(name: str, **options: Any) -> Step:
    return discover().get(name).step({"algorithm": "magnitude"} | options)


def store(
    step: Step, weight: torch.Tensor, dtype: torch.dtype = torch.bfloat16
) -> tuple[Layer, StoredLayer]:
    layer = pipeline.quantize(Layer("layer", weight, dtype), [step], [{}])
    return layer, pipeline.serialize(pipeline.pack(layer, [step]), [step])


def weights(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    return (
        torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).bfloat16().float()
    )


# What a config says of weights that no step has quantized.
PLAIN_WEIGHTS = {
    "num_bits": 16,
    "type": "int",
    "symmetric": True,
    "dynamic": False,
    "strategy": "channel",
}


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_model_of_any_dtype_is_stored_in_it(name: str, dtype: torch.dtype) -> None:
    weight = weights(4, 64)
    layer, stored = store(make_step(name), weight, dtype)
    assert stored.tensors["weight"].dtype == dtype
    assert torch.equal(layer.weight, torch.where(layer.weight != 0, weight, 0.0))


def test_a_row_is_laid_out_as_the_format_says() -> None:
    row = torch.tensor([[0, 1, 0, 2, 3, 4, 0, 0, 5, 0, 0, 6, 0, 0, 7, 8.0]])
    assert bitmask.pack_mask(row != 0).tolist() == [[58, 201]]
    assert bitmask.compress(row, row != 0).tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]
    mask = bitmask.unpack_mask(bitmask.pack_mask(row != 0), 16)
    assert torch.equal(bitmask.decompress(bitmask.compress(row, row != 0), mask), row)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    st.sampled_from(SCHEMES),
    st.integers(1, 20),
    st.integers(1, 30),
    st.integers(0, 3),
    st.integers(0, 1000),
)
def test_restoring_is_exact_in_either_layout(
    name: str, rows: int, quads: int, odd: int, seed: int
) -> None:
    width = 4 * quads + (odd if name == "sparse" else 0)
    # some are zero already
    weight = weights(rows, width, seed) * (weights(rows, width, seed + 1) > -0.5)
    patterns = (
        [{}] if name == "sparse" or width % 8 else [{}, {"pattern": "4:8"}, {"pattern": "6:8"}]
    )
    for layout, pattern in itertools.product(("dense", "bitmask"), patterns):
        step = make_step(name, layout=layout, **pattern)
        layer, stored = store(step, weight)
        assert torch.equal(pipeline.dequantize(stored.tensors, stored.config, [step]), layer.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_bitmask_stores_each_row_s_weights_and_a_bit_for_each_place(dtype: torch.dtype) -> None:
    _, stored = store(make_step("sparse-2of4", layout="bitmask"), weights(6, 20), dtype)
    result = {name: (t.dtype, tuple(t.shape)) for name, t in stored.tensors.items()}
    assert result == {
        "compressed": (dtype, (6, 10)),
        "bitmask": (torch.uint8, (6, 3)),
        "shape": (torch.int64, (2, 1)),
    }
    assert stored.config == {
        "format": "sparse-24-bitmask",
        "weights": PLAIN_WEIGHTS,
        "sparsity_config": {"format": "sparse-24-bitmask", "sparsity_structure": "2:4"},
    }
    _, stored = store(make_step("sparse", layout="bitmask", sparsity=0.7), weights(6, 20), dtype)
    result = {name: (t.dtype, tuple(t.shape)) for name, t in stored.tensors.items()}
    assert result == {
        "compressed": (dtype, (36,)),
        "bitmask": (torch.uint8, (6, 3)),
        "shape": (torch.int64, (2,)),
        "row_offsets": (torch.int64, (6,)),
    }
    assert stored.tensors["row_offsets"].tolist() == [0, 6, 12, 18, 24, 30]
    assert stored.config == {
        "format": "sparse-bitmask",
        "weights": PLAIN_WEIGHTS,
        "sparsity_config": {"format": "sparse-bitmask", "sparsity_structure": "unstructured"},
    }


def test_a_plain_weight_needs_no_config() -> None:
    for name in SCHEMES:
        layer, stored = store(make_step(name), weights(6, 20))
        assert stored.config is None
        assert {n: t.dtype for n, t in stored.tensors.items()} == {"weight": torch.bfloat16}
        assert torch.equal(stored.tensors["weight"].float(), layer.weight)


# --- the commands
# ----------------------------------------------------------------------

MAGNITUDE = ["--set", "algorithm=magnitude"]


def compress(source: Path, out: Path, scheme: str, *arguments: object) -> Path:
    done = command("compress", source, out, "--scheme", scheme, *MAGNITUDE, *arguments)
    assert done.returncode == 0, done.stderr
    words = "while they are loaded" if "layout=bitmask" in arguments else "neither size nor speed"
    assert words in done.stderr
    return out


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_default_is_the_same_model_with_zeros_in_it(
    tmp_path: Path, scheme: str, shards: int
) -> None:
    source = write_model(tmp_path / "m", shards=shards)
    out = compress(source, tmp_path / "o", scheme)
    before, after = tensors_of(source), tensors_of(out)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        same = after[name] == tensor
        assert same.all() != ("_proj" in name)
        assert ((after[name] == 0) | same).all()
    assert json.loads((out / "config.json").read_text()) == json.loads(
        (source / "config.json").read_text()
    )
    assert command("verify", out, "--against", source).returncode == 0


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_bitmask_is_read_back(tmp_path: Path, scheme: str, shards: int) -> None:
    source = write_model(tmp_path / "m", shards=shards)
    plain = compress(source, tmp_path / "plain", scheme)
    out = compress(source, tmp_path / "o", scheme, "--set", "layout=bitmask")
    assert command("verify", out, "--against", source).returncode == 0
    # bits per weight: eight, and one for its place
    assert "9." in command("inspect", out).stdout
    assert command("decompress", out, tmp_path / "dense").returncode == 0
    expected, tensors = tensors_of(plain), tensors_of(tmp_path / "dense")
    assert expected.keys() == tensors.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    of_zeros = dict(make_step(scheme, layout="bitmask").options.sparsity_config)
    # a format that transformers does not know: it refuses it, and makes up no weights
    group = {"format": of_zeros["format"], "weights": PLAIN_WEIGHTS}
    assert config == {
        "quant_method": "compressed-tensors",
        "format": of_zeros["format"],
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], **group}},
        "sparsity_config": of_zeros | {"targets": ["Linear"], "ignore": ["lm_head"]},
    }


def test_rows_read_in_pieces_are_put_together(tmp_path: Path) -> None:
    # several row tiles
    source = write_model(
        tmp_path / "m", config=LLAMA | {"intermediate_size": 4096, "num_hidden_layers": 1}
    )
    for scheme in SCHEMES:
        out = compress(source, tmp_path / scheme, scheme, "--set", "layout=bitmask")
        assert command("verify", out, "--against", source).returncode == 0


@pytest.mark.parametrize("scheme", SCHEMES)
def test_verify_counts_the_zeros(tmp_path: Path, scheme: str) -> None:
    source = write_model(tmp_path / "m")
    out = compress(source, tmp_path / "o", scheme, "--no-verify")
    tensors = load_file(out / "model.safetensors")
    weight = tensors[f"{LAYER}.weight"]
    weight[100, (weight[100] == 0).nonzero()[0]] = 0.5
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    done = command("verify", out)
    assert done.returncode == 1
    most = "3 of 4 neighbors" if scheme == "sparse-2of4" else "65 of 128 neighbors"
    assert f"{LAYER}: {scheme}: {most} are not zero" in done.stderr


def test_a_mask_that_does_not_fit_its_weights_is_a_fault(tmp_path: Path) -> None:
    out = compress(
        write_model(tmp_path / "m"),
        tmp_path / "o",
        "sparse",
        "--set",
        "layout=bitmask",
        "--no-verify",
    )
    tensors = load_file(out / "model.safetensors")
    tensors[f"{LAYER}.bitmask"][3, 3] = 255
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    done = command("verify", out)
    assert done.returncode == 1
    assert LAYER in done.stderr


@pytest.mark.parametrize("threads", [1, 3])
def test_any_number_of_threads_writes_the_same_bytes(tmp_path: Path, threads: int) -> None:
    source = write_model(tmp_path / "m", shards=2)
    out = compress(source, tmp_path / "o", "sparse", "--threads", threads)
    assert files_of(out) == files_of(compress(source, tmp_path / "again", "sparse", "--threads", 2))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_plan_and_the_summary_say_what_zeros_are_good_for(tmp_path: Path, scheme: str) -> None:
    source, words = write_model(tmp_path / "m"), "neither size nor speed changes there"
    assert words in command("plan", source, "--scheme", scheme).stderr
    done = command("compress", source, tmp_path / "o", "--scheme", scheme, *MAGNITUDE)
    # before
    assert words in done.stderr
    # and after
    assert words in " ".join(done.stdout.split())
    plan = command("plan", source, "--scheme", scheme, "--set", "layout=bitmask")
    assert "zeros come back while they are loaded: neither memory nor speed changes" in plan.stderr
    card = compress(source, tmp_path / "bits", scheme, "--set", "layout=bitmask") / "README.md"
    assert "pip install bitpress-vllm-sparse\nvllm serve OUT" in card.read_text()


# --- what is refused
# ----------------------------------------------------------------------


def recipe(folder: Path, **steps_by_pattern: str) -> Path:
    """A recipe of rules: steps by pattern."""
    file = folder / "recipe.toml"
    file.write_text(
        "".join(
            f'[[layers]]\nmatch = "{match}"\nsteps = {steps}\n'
            for match, steps in steps_by_pattern.items()
        )
    )
    return file


def test_two_bitmask_layouts_in_one_model_are_refused(tmp_path: Path) -> None:
    both = recipe(
        tmp_path,
        **{
            "*.mlp.*": '[{ use = "sparse", layout = "bitmask" }]',
            "*": '[{ use = "sparse-2of4", layout = "bitmask", algorithm = "magnitude" }]',
        },
    )
    line = refusal("plan", write_model(tmp_path / "m"), "--recipe", both)
    assert (
        "sparse-24-bitmask and sparse-bitmask at once" in line
        or "sparse-bitmask and sparse-24-bitmask at once" in line
    )


def test_shares_may_differ_from_layer_to_layer(tmp_path: Path) -> None:
    steps_by_pattern = recipe(
        tmp_path,
        **{
            "*.layers.0.*": '[{ use = "sparse", sparsity = 0.25, layout = "bitmask" }]',
            "*": '[{ use = "sparse", sparsity = 0.75, layout = "bitmask" }]',
        },
    )
    source = write_model(tmp_path / "m")
    assert command("compress", source, tmp_path / "o", "--recipe", steps_by_pattern).returncode == 0
    assert command("verify", tmp_path / "o", "--against", source).returncode == 0
    assert tensors_of(tmp_path / "o")["model.layers.0.self_attn.q_proj.compressed"].shape == (
        128 * 96,
    )
    assert tensors_of(tmp_path / "o")["model.layers.1.self_attn.q_proj.compressed"].shape == (
        128 * 32,
    )


# A scheme that stores codes, after which no step may follow.
TOY = """
import attrs
from bitpress import StoredLayer, hookimpl

@hookimpl
def quantize(layer):
    return attrs.evolve(layer, weight=layer.weight.round(), codes=layer.weight.round().char())

@hookimpl
def serialize(layer):
    config = {"format": "toy-format", "weights": {"num_bits": 8}}
    return StoredLayer({"weight_bytes": layer.codes}, config)
"""


def install_toy(folder: Path) -> Path:
    """The scheme `toy`, found once the folder is on the path."""
    entry = "[bitpress.schemes]\ntoy = bitpress_scheme_toy\n"
    return install(folder, "bitpress-scheme-toy", TOY, entry)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--scheme", "sparse", "--set", "sparsity=1"],
            "sparsity 1.0 is not a share between 0 and 1",
        ),
        (["--scheme", "sparse", "--set", "sparsity=half"], "number"),
        (["--scheme", "sparse-2of4", "--set", "sparsity=0.6"], "no option 'sparsity'"),
        (
            ["--scheme", "sparse-2of4+toy", "--set", "layout=bitmask"],
            "layout=bitmask does not take toy-format; layout=dense stores zeros like other weights",
        ),
        (["--scheme", "toy+sparse"], "sparse cannot follow a step that stores codes"),
    ],
)
def test_what_cannot_be_done_is_told_before_it_is_begun(
    tmp_path: Path, arguments: list[str], words: str
) -> None:
    assert words in refusal(
        "plan", write_model(tmp_path / "m"), *arguments, path=install_toy(tmp_path / "p")
    )


def test_a_width_that_is_no_multiple_of_four_is_refused_naming_the_layer(tmp_path: Path) -> None:
    source = write_model(tmp_path / "m", config=LLAMA | {"intermediate_size": 130})
    line = refusal("plan", source, "--scheme", "sparse-2of4")
    for words in (
        "model.layers.0.mlp.down_proj",
        "width 130 is not a multiple of 4",
        "scheme sparse takes any",
    ):
        assert words in line
    assert command("plan", source, "--scheme", "sparse").returncode == 0


@pytest.mark.parametrize("leaf", ["q_proj", "up_proj"])
def test_layers_that_engines_fuse_must_get_the_same_steps(tmp_path: Path, leaf: str) -> None:
    source = write_model(tmp_path / "m")
    for steps in ('["sparse-2of4"]', "[]", '[{ use = "sparse", sparsity = 0.4 }]'):
        line = refusal(
            "plan", source, "--recipe", recipe(tmp_path, **{f"*.{leaf}": steps, "*": '["sparse"]'})
        )
        assert f".{leaf}" in line
        assert "must get the same steps" in line
    same_steps = recipe(
        tmp_path, **{f"*.{leaf}": '["sparse"]', "*": '[{ use = "sparse", sparsity = 0.5 }]'}
    )
    assert command("plan", source, "--recipe", same_steps).returncode == 0


@pytest.mark.parametrize(
    ("name", "layout", "device", "levels"),
    [
        ("sparse-2of4", "dense", "H100", ["supported", "supported", "degraded"]),
        ("sparse-2of4", "dense", "T4", ["supported", "degraded"]),
        ("sparse-2of4", "dense", "CPU x86", ["supported", "degraded"]),
        ("sparse-2of4", "bitmask", "A100", ["supported", "supported"]),
        ("sparse-2of4", "bitmask", "CPU x86", ["supported", "degraded"]),
        ("sparse", "dense", "H100", ["supported", "degraded"]),
        ("sparse", "bitmask", "H100", ["supported", "degraded"]),
    ],
)
def test_hardware_is_judged_by_what_its_engine_makes_of_zeros(
    name: str, layout: str, device: str, levels: list[str]
) -> None:
    result = make_step(name, layout=layout).call("validate_hardware", hardware=find_device(device))
    assert [finding.level for finding in result] == levels
