"""A model that is published in 4 or 8 bits is compressed as the model that it stands for, whatever
its layers are coded as, wherever they lie, and on data too.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.architectures import build
from fixtures.coded_layers import (
    AWQ,
    GPTQ,
    GROUP,
    INTEGERS,
    MXFP4,
    Code,
    awq,
    code_layers,
    config_group,
    config_of,
    fp8_rows,
    gptq,
    mxfp4,
    packed,
    write_gpt_oss,
)
from fixtures.draft_models import build_draft_model
from fixtures.learner_scheme import with_tokenizer
from torch import Tensor

import bitpress
from bitpress.conformance.commands import refusal
from bitpress.conformance.models import LLAMA, llama_tensors, tensors_of, write_model

SMALL = LLAMA | {"num_hidden_layers": 1, "torch_dtype": "float32"}
DATA = {"samples": 3, "sequence_length": 32}


def write_both(
    folder: Path,
    tensors: dict[str, Tensor],
    config: dict[str, Any],
    choose: Callable[[str], Code | None],
    shards: int = 1,
) -> tuple[Path, Path]:
    """The coded model, and the one that it stands for: float32 holds their weights exactly.

    Args:
        config: of the coded one.
        choose: how a layer is coded.
    """
    stored, plain = code_layers({name: x.float() for name, x in tensors.items()}, choose)
    config = {**config, "torch_dtype": "float32", "dtype": "float32"}
    of_plain = {key: value for key, value in config.items() if key != "quantization_config"}
    return (
        with_tokenizer(write_model(folder / "coded/m", stored, config, shards)),
        with_tokenizer(write_model(folder / "plain/m", plain, of_plain)),
    )


def compress_both(models: tuple[Path, Path], **arguments: Any) -> tuple[Path, Path]:
    """What becomes of both, by the same commands."""
    outputs = []
    for model in models:
        outputs.append(model.parent / "out")
        bitpress.compress(model, outputs[-1], more_bits=True, **arguments)
    return outputs[0], outputs[1]


def assert_same(first: Path, second: Path) -> None:
    tensors, expected = tensors_of(first), tensors_of(second)
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        numbers = tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor
        assert torch.equal(tensors[name].view(numbers.dtype), numbers), name
    tables = [
        json.loads((out / "config.json").read_text())["quantization_config"]
        for out in (first, second)
    ]
    # listed in the order of the files
    ignored = [set(table.pop("ignore")) for table in tables]
    assert tables[0] == tables[1]
    assert ignored[0] == ignored[1]


SOURCES: dict[str, tuple[dict[str, Any], Code]] = {
    "AWQ": (AWQ, awq),
    "GPTQ": (GPTQ, gptq),
    "packed integers": (INTEGERS, packed),
    "MXFP4": (MXFP4, mxfp4),
}


# nvfp4 keeps the codes of MXFP4
@pytest.mark.parametrize(
    ("name", "scheme"),
    [*((name, "w4a16") for name in SOURCES), ("AWQ", "nvfp4"), ("packed integers", "nvfp4")],
)
def test_it_is_calibrated_as_what_it_stands_for(tmp_path: Path, name: str, scheme: str) -> None:
    table, code = SOURCES[name]
    models = write_both(
        tmp_path,
        llama_tensors(config=SMALL),
        SMALL | {"quantization_config": table},
        lambda module: code if ".layers." in module else None,
    )
    text = tmp_path / "coded/text.txt"
    outputs = compress_both(models, scheme=scheme, calibration=text, **DATA)
    assert_same(*outputs)
    manifest = bitpress.inspect(outputs[0])
    assert all(layer.error for layer in manifest.layers.values())


def experts_in_4_bits_beside_fp8(module: str) -> Code | None:
    if ".experts." in module:
        return packed
    return fp8_rows if ".self_attn." in module else None


# The layout of Kimi K2's experts, and of attention that others keep in 8 bits.
MIXED = {
    "quant_method": "compressed-tensors",
    "format": "mixed-precision",
    "config_groups": {
        "experts": config_group(["re:.*experts.*"], "pack-quantized", type="int", symmetric=True),
        "attention": config_group(
            ["re:.*self_attn.*"], "float-quantized", type="float", num_bits=8, strategy="channel"
        ),
    },
}


# forms in which no code of the source is kept
@pytest.mark.parametrize(
    ("scheme", "settings"),
    [
        ("fp8", ["weights=tensor"]),
        ("w4a16", ["group_size=channel"]),
        ("nvfp4", []),
        ("int8", ["smoothing=0"]),
    ],
)
def test_a_mixed_source_is_compressed_as_what_it_stands_for(
    tmp_path: Path, scheme: str, settings: list[str]
) -> None:
    made = build("qwen3_moe", tmp_path / "made")
    models = write_both(
        tmp_path, tensors_of(made), config_of(made, MIXED), experts_in_4_bits_beside_fp8
    )
    text = tmp_path / "coded/text.txt"
    assert_same(*compress_both(models, scheme=scheme, settings=settings, calibration=text, **DATA))


@pytest.mark.parametrize("scheme", ["fp8", "w4a16"])
def test_a_source_in_shards_with_a_block_of_drafts_is_compressed_as_what_it_stands_for(
    tmp_path: Path, scheme: str
) -> None:
    made = build_draft_model("DeepseekV3ForCausalLM", tmp_path / "made")
    tensors = tensors_of(made)

    def choose(module: str) -> Code | None:
        rows, columns = tensors[f"{module}.weight"].shape
        is_layer = ".mlp." in module or ".self_attn." in module
        return gptq if is_layer and "gate." not in module and not (rows | columns) % GROUP else None

    models = write_both(tmp_path, tensors, config_of(made, GPTQ), choose, shards=3)
    assert any(".layers.2." in name and "qweight" in name for name in tensors_of(models[0]))
    assert_same(*compress_both(models, scheme=scheme, effort="low"))


def test_experts_of_gpt_oss_are_refused_with_what_the_engine_reads(tmp_path: Path) -> None:
    model, _ = write_gpt_oss(tmp_path)
    line = refusal("plan", model, "--scheme", "fp8")
    for words in ("model.layers.0.mlp.experts", "MXFP4", "'*.experts' stores them in 16 bits"):
        assert words in line


@pytest.mark.parametrize("scheme", ["fp8", "w4a16"])
def test_attention_of_gpt_oss_is_compressed_beside_experts_in_16_bits(
    tmp_path: Path, scheme: str
) -> None:
    model, experts = write_gpt_oss(tmp_path)
    manifest = bitpress.compress(
        model, tmp_path / "out", scheme=scheme, effort="low", ignore=["*.experts"]
    )
    assert manifest.layers.keys() == {
        f"model.layers.{block}.self_attn.{leaf}_proj" for block in (0, 1) for leaf in "qkvo"
    }
    stored = tensors_of(tmp_path / "out")
    for name, expected in experts.items():
        assert torch.equal(stored[name], expected), name
