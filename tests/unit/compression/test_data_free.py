"""From a checkpoint on disk to a smaller one: what arrives, what is planned, and the way back."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.toy_scheme import TOY
from safetensors import safe_open

import bitpress
from bitpress.checkpoint.safetensors import read_header
from bitpress.conformance.commands import command, install, plugins
from bitpress.conformance.models import LLAMA, files_of, llama_tensors, tensors_of, write_model

TIED = LLAMA | {"tie_word_embeddings": True}
LAYERS = {n.removesuffix(".weight") for n in llama_tensors() if "_proj" in n}
# tensors that the core has no idea of
UNKNOWN = {
    "model.layers.2.eh_proj.weight": torch.randn(16, 32).bfloat16(),
    "model.layers.2.self_attn.q_proj.weight": torch.randn(16, 16).bfloat16(),
    "mtp.layers.0.mlp.up_proj.weight": torch.randn(16, 16),
    "visual.blocks.0.attn.qkv.weight": torch.randn(48, 16).half(),
    "model.layers.0.mlp.experts.gate_up_proj": torch.randn(2, 16, 32).bfloat16(),
    "model.layers.0.self_attn.rotary_emb.inv_freq": torch.randn(16),
    "model.layers.0.self_attn.q_proj.bias": torch.randn(128).bfloat16(),
    "model.not_a_number": torch.tensor([torch.nan, torch.inf, -0.0]),
    "counts": torch.arange(3),
    "flag": torch.tensor(True),
    "empty": torch.empty(0, 4, dtype=torch.float16),
    "wave": torch.randn(3, dtype=torch.complex64),
    "codes": torch.randn(4, 4).to(torch.float8_e5m2),
}


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@pytest.fixture(
    params=[(1, LLAMA), (3, LLAMA), (1, TIED), (7, TIED)],
    ids=["one file", "3 shards", "tied", "tied, 7 shards"],
)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    shards, config = request.param
    folder = write_model(tmp_path / "model", llama_tensors(config=config) | UNKNOWN, config, shards)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/voice.jinja").write_bytes(b"\x00\xff")
    (folder / "generation_config.json").write_text("{}")
    (folder / ".gitattributes").write_text("of the place it came from")
    return folder


def test_every_tensor_of_the_source_arrives_compressed_or_byte_for_byte(
    tmp_path: Path, with_toy: Path, model: Path
) -> None:
    bitpress.compress(model, tmp_path / "out", scheme="toy")
    before, after = tensors_of(model), tensors_of(tmp_path / "out")
    copied = {name for name in before if name.removesuffix(".weight") not in LAYERS}
    assert after.keys() == copied | {
        f"{layer}.{suffix}" for layer in LAYERS for suffix in ("weight", "weight_scale")
    }
    assert copied >= UNKNOWN.keys()
    for name in copied:
        assert (after[name].dtype, after[name].shape) == (before[name].dtype, before[name].shape)
        assert torch.equal(raw(after[name]), raw(before[name])), name
    for layer in LAYERS:
        restored = after[f"{layer}.weight"] * after[f"{layer}.weight_scale"]
        assert after[f"{layer}.weight"].dtype == torch.int8
        assert (restored - before[f"{layer}.weight"].float()).abs().max() <= after[
            f"{layer}.weight_scale"
        ].max() * 0.501


def test_every_other_file_of_the_source_is_carried_over(
    tmp_path: Path, with_toy: Path, model: Path
) -> None:
    bitpress.compress(model, tmp_path / "out", scheme="toy")
    before, after = files_of(model), files_of(tmp_path / "out")
    for name in (
        "tokenizer_config.json",
        "generation_config.json",
        "additional_chat_templates/voice.jinja",
    ):
        assert after[name] == before[name]
    ours = {"config.json", "bitpress.json", "README.md", "model.safetensors.index.json"}
    weights = {name for name in after if name.endswith(".safetensors")}
    assert (
        set(after) - weights - ours
        == set(before) - {".gitattributes"} - {n for n in before if "safetensors" in n} - ours
    )


def test_the_config_gains_the_quantization_and_nothing_else(
    tmp_path: Path, with_toy: Path, model: Path
) -> None:
    bitpress.compress(model, tmp_path / "out", scheme="toy")
    before, after = (
        json.loads((folder / "config.json").read_text()) for folder in (model, tmp_path / "out")
    )
    quantized = after.pop("quantization_config")
    assert after == before
    assert quantized["quant_method"] == "compressed-tensors"
    assert quantized["quantization_status"] == "compressed"
    assert quantized["format"] == "int-quantized"
    assert list(quantized["config_groups"].values()) == [
        {
            "targets": ["Linear"],
            "format": "int-quantized",
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
        }
    ]
    assert {"lm_head", "visual.blocks.0.attn.qkv", "mtp.layers.0.mlp.up_proj"} <= set(
        quantized["ignore"]
    )


def test_the_index_names_the_file_of_every_tensor(
    tmp_path: Path, with_toy: Path, model: Path
) -> None:
    bitpress.compress(model, tmp_path / "out", scheme="toy")
    held = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(file, "pt") as f:
            assert f.metadata()["format"] == "pt"
            held |= dict.fromkeys(f.keys(), file.name)
    index = tmp_path / "out/model.safetensors.index.json"
    if set(held.values()) == {"model.safetensors"}:
        assert not index.exists()
    else:
        table = json.loads(index.read_text())
        assert table["weight_map"] == held
        assert table["metadata"]["total_size"] == sum(
            t.nbytes for t in tensors_of(tmp_path / "out").values()
        )


def test_the_plan_is_exactly_what_is_written(tmp_path: Path, with_toy: Path, model: Path) -> None:
    plan = bitpress.plan(model, scheme="toy")
    bitpress.compress(model, tmp_path / "out", scheme="toy")
    written = files_of(tmp_path / "out")
    assert sorted(plan.files) == sorted(written)
    assert plan.source_bytes == sum(
        len(data) for name, data in files_of(model).items() if name.endswith(".safetensors")
    )
    assert plan.output_bytes == sum(
        len(data) for name, data in written.items() if name.endswith(".safetensors")
    )
    for shard in plan.shards:
        assert shard.header.nbytes == len(written[shard.name])
        assert read_header(tmp_path / "out" / shard.name).is_same_layout(shard.header)
    assert json.loads(written["config.json"]) == plan.config


def test_the_manifest_holds_sizes_digests_bits_and_errors(
    tmp_path: Path, with_toy: Path, model: Path
) -> None:
    bitpress.compress(model, tmp_path / "out", scheme="toy", settings=["levels=63"])
    manifest = json.loads((tmp_path / "out/bitpress.json").read_text())
    for key, folder, names in (
        ("files", tmp_path / "out", set(files_of(tmp_path / "out")) - {"bitpress.json"}),
        ("inputs", model, {name for name in files_of(model) if name.endswith(".safetensors")}),
    ):
        assert manifest[key].keys() == names
        for name in names:
            data = (folder / name).read_bytes()
            is_shard = key == "files" and name.endswith(".safetensors")
            header = data[: 8 + int.from_bytes(data[:8], "little")]
            assert manifest[key][name] == {
                "bytes": len(data),
                "sha256": hashlib.sha256(data).hexdigest(),
                "header": hashlib.sha256(header).hexdigest() if is_shard else None,
            }
    assert manifest["schemes"] == {"toy": "bitpress-scheme-toy 1.0"}
    assert manifest["recipe"]["layers"][0]["steps"] == [{"use": "toy", "levels": 63, "multiple": 1}]
    assert manifest["source"] == "model"
    before, after = tensors_of(model), tensors_of(tmp_path / "out")
    assert manifest["layers"].keys() == LAYERS
    for layer, result in manifest["layers"].items():
        weight = before[f"{layer}.weight"].float()
        restored = after[f"{layer}.weight"] * after[f"{layer}.weight_scale"]
        assert result["bits"] == 8 + 32 / weight.shape[1]
        assert result["error"] == pytest.approx(
            ((restored - weight).norm() / weight.norm()).item(), rel=1e-5
        )


def test_without_verification_the_weights_are_the_same_and_no_error_is_claimed(
    tmp_path: Path, with_toy: Path
) -> None:
    model = write_model(tmp_path / "model")
    bitpress.compress(model, tmp_path / "proved", scheme="toy")
    manifest = bitpress.compress(model, tmp_path / "out", scheme="toy", verify=False)
    assert (tmp_path / "out/model.safetensors").read_bytes() == (
        tmp_path / "proved/model.safetensors"
    ).read_bytes()
    assert {layer.error for layer in manifest.layers.values()} == {None}


def test_decompressing_gives_the_restored_weights_in_the_source_s_dtype(
    tmp_path: Path, with_toy: Path, model: Path
) -> None:
    bitpress.compress(model, tmp_path / "out", scheme="toy")
    bitpress.decompress(tmp_path / "out", tmp_path / "dense")
    before, small, dense = (
        tensors_of(folder) for folder in (model, tmp_path / "out", tmp_path / "dense")
    )
    assert dense.keys() == before.keys()
    for name, tensor in dense.items():
        layer = name.removesuffix(".weight")
        restored = small[name] * small[f"{layer}.weight_scale"] if layer in LAYERS else before[name]
        assert tensor.dtype == before[name].dtype
        assert torch.equal(raw(tensor), raw(restored.to(tensor.dtype))), name
    others = {
        name for name in files_of(model) if "safetensors" not in name and name != ".gitattributes"
    }
    assert {
        n: d for n, d in files_of(tmp_path / "dense").items() if "safetensors" not in n
    }.keys() == others
    assert json.loads((tmp_path / "dense/config.json").read_text()) == json.loads(
        (model / "config.json").read_text()
    )
    # it is a model folder like any other
    bitpress.compress(tmp_path / "dense", tmp_path / "again", scheme="toy")


RECIPE = """
[[layers]]
match = "*.layers.0.self_attn.*"
steps = []
[[layers]]
match = "*.self_attn.*"
steps = [{ use = "toy", levels = 7 }]
[[layers]]
match = ["model.layers.0.mlp.*", "model.layers.1.mlp.*"]
steps = ["toy"]
"""


@pytest.mark.parametrize(
    ("ignore", "settings", "expected"),
    [
        ([], [], {"0.self_attn": None, "1.self_attn": 7, "0.mlp": 127, "1.mlp": 127}),
        (
            ["*.layers.1.mlp.*"],
            [],
            {"0.self_attn": None, "1.self_attn": 7, "0.mlp": 127, "1.mlp": None},
        ),
        ([], ["levels=31"], {"0.self_attn": None, "1.self_attn": 31, "0.mlp": 31, "1.mlp": 31}),
    ],
    ids=["as it stands", "with --ignore", "with --set"],
)
def test_of_a_recipe_the_first_rule_that_matches_counts(
    tmp_path: Path,
    with_toy: Path,
    ignore: list[str],
    settings: list[str],
    expected: dict[str, int | None],
) -> None:
    model, out = write_model(tmp_path / "model"), tmp_path / "out"
    (tmp_path / "recipe.toml").write_text(RECIPE)
    bitpress.compress(model, out, recipe=tmp_path / "recipe.toml", ignore=ignore, settings=settings)
    before, after = tensors_of(model), tensors_of(out)
    for layer in LAYERS:
        levels = expected[".".join(layer.split(".")[2:4])]
        result = after[f"{layer}.weight"]
        assert (f"{layer}.weight_scale" in after) == (levels is not None)
        assert (
            result.abs().max() == levels
            if levels
            else torch.equal(result, before[f"{layer}.weight"])
        )


OBSERVE = (
    "def observe(weight): return {'amax': bitpress.Statistic(weight.abs().amax(), 'max')"
    "}\n@hookimpl\n"
)
SHARED = (
    TOY.replace('"channel"', '"tensor"')
    .replace("def quantize(layer, options)", OBSERVE + "def quantize(layer, stats, options)")
    .replace("layer.weight.abs().amax(1, keepdim=True)", 'stats["amax"].value')
    .replace('layer.qparams["scale"]}', 'layer.qparams["scale"].reshape(1)}')
)


@pytest.mark.parametrize("shards", [1, 3], ids=["in one file", "in different files"])
def test_a_statistic_of_the_weights_covers_a_whole_stack(tmp_path: Path, shards: int) -> None:
    install(
        tmp_path / "p",
        "bitpress-scheme-toy",
        SHARED,
        "[bitpress.schemes]\ntoy = bitpress_scheme_toy\n",
    )
    source = llama_tensors()
    with plugins(tmp_path / "p"):
        bitpress.compress(
            write_model(tmp_path / "model", shards=shards), tmp_path / "out", scheme="toy"
        )
    tensors = tensors_of(tmp_path / "out")
    for members in (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("mlp.gate_proj", "mlp.up_proj"),
    ):
        names = [f"model.layers.1.{member}" for member in members]
        largest = max(source[f"{name}.weight"].float().abs().max() for name in names)
        assert all(
            torch.equal(tensors[f"{name}.weight_scale"], (largest / 127).reshape(1))
            for name in names
        )


def test_json_is_one_document_and_nothing_else(tmp_path: Path, toy: Path) -> None:
    model, out = write_model(tmp_path / "model"), tmp_path / "out"
    runs: dict[str, list[Any]] = {
        "plan": [model, "--scheme", "toy"],
        "compress": [model, out, "--scheme", "toy"],
        "inspect": [out],
        "verify": [out, "--against", model],
        "schemes": [],
    }
    documents = {}
    for name, arguments in runs.items():
        done = command(name, *arguments, "--json", path=toy)
        assert done.returncode == 0, done.stderr
        documents[name] = json.loads(done.stdout)
    assert documents["compress"]["verified"] is True
    assert (
        documents["compress"]["after"]
        == documents["plan"]["after"]
        == (out / "model.safetensors").stat().st_size
    )
    assert documents["inspect"]["layers"] == documents["compress"]["layers"]
    errors = {n: e["error"] for n, e in documents["inspect"]["layers"].items()}
    assert documents["verify"] == {"ok": True, "faults": [], "errors": errors, "remarks": []}


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
def test_a_copied_weight_that_is_not_finite_is_refused(
    tmp_path: Path, with_toy: Path, name: str, value: float
) -> None:
    tensors = llama_tensors()
    tensors[name][7, 5] = value
    model = write_model(tmp_path / "model", tensors)
    with pytest.raises(bitpress.CheckpointError, match=f"{name} holds NaN or infinity"):
        bitpress.compress(model, tmp_path / "out", scheme="toy")
    assert not (tmp_path / "out/config.json").exists()


def test_a_mask_that_is_copied_may_be_infinite(tmp_path: Path, with_toy: Path) -> None:
    mask = torch.full((4, 4), -torch.inf).triu(1)
    model = write_model(tmp_path / "model", {**llama_tensors(), "model.mask": mask})
    bitpress.compress(model, tmp_path / "out", scheme="toy")
    assert torch.equal(tensors_of(tmp_path / "out")["model.mask"], mask)


def test_a_weight_near_the_largest_number_has_an_error_that_is_a_number(
    tmp_path: Path, with_toy: Path
) -> None:
    tensors = llama_tensors()
    name = "model.layers.0.mlp.up_proj"
    tensors[f"{name}.weight"][3, 4] = 3e38
    model = write_model(tmp_path / "model", tensors)
    manifest = bitpress.compress(model, tmp_path / "out", scheme="toy")
    restored = tensors_of(tmp_path / "out")
    weight = tensors[f"{name}.weight"].double()
    distance = restored[f"{name}.weight"] * restored[f"{name}.weight_scale"] - weight
    assert manifest.layers[name].error == pytest.approx(float(distance.norm() / weight.norm()))
    for file in ("bitpress.json", "README.md"):
        assert "nan" not in (tmp_path / "out" / file).read_text().lower()


@pytest.mark.parametrize("where", ["", "text_config"])
def test_a_model_without_the_head_that_its_config_asks_for_is_refused(
    tmp_path: Path, with_toy: Path, where: str
) -> None:
    tensors = llama_tensors()
    del tensors["lm_head.weight"]
    config = {**LLAMA, where: {"tie_word_embeddings": False}} if where else LLAMA
    model = write_model(tmp_path / "model", tensors, config)
    with pytest.raises(bitpress.CheckpointError, match=r"no lm_head\.weight"):
        bitpress.plan(model, scheme="toy")
