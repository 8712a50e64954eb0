"""DeepSeek V4 as it is published is compressed as the model that it stands for, of which engines
find every layer as their classes read it.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from fixtures.deepseek_v4 import write_deepseek_v4
from torch import Tensor

import bitpress
from bitpress.conformance.commands import refusal
from bitpress.conformance.models import tensors_of

SETTINGS = {
    "fp8": [],
    "w4a16": ["algorithm=rtn", "group_size=32"],
    "nvfp4": ["algorithm=rtn", "activations=float"],
}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    return write_deepseek_v4(tmp_path_factory.mktemp("v4"))


@pytest.fixture(scope="module")
def dense(published: tuple[Path, dict[str, Tensor]]) -> Path:
    out = published[0].parent / "dense"
    bitpress.decompress(published[0], out)
    return out


def test_it_is_decompressed_to_the_numbers_that_it_stands_for(
    published: tuple[Path, dict[str, Tensor]], dense: Path
) -> None:
    model, weights = published
    stored, source = tensors_of(dense), tensors_of(model)
    assert stored.keys() == {name for name in source if not name.endswith(".scale")}
    for name, tensor in stored.items():
        assert torch.equal(tensor, weights[name].bfloat16() if name in weights else source[name])


@pytest.mark.parametrize("scheme", SETTINGS)
def test_what_engines_quantize_is_compressed(
    published: tuple[Path, dict[str, Tensor]], tmp_path: Path, scheme: str
) -> None:
    out = tmp_path / "out"
    manifest = bitpress.compress(
        published[0], out, scheme=scheme, settings=SETTINGS[scheme], more_bits=True
    )
    experts = ("shared_experts", "experts.0", "experts.1")
    leaves = ["attn.wq_a", "attn.wq_b", "attn.wkv", "attn.wo_b"]
    leaves += [f"ffn.{expert}.w{number}" for expert in experts for number in (1, 2, 3)]
    expected = {f"layers.{block}.{leaf}" for block in range(3) for leaf in leaves}
    assert manifest.layers.keys() == expected | {"layers.1.attn.indexer.wq_b"}
    assert not bitpress.verify(out, published[0]).faults


# forms in which no code of the source is kept
@pytest.mark.parametrize(
    ("scheme", "settings"), [("fp8", ["weights=tensor"]), ("w4a16", SETTINGS["w4a16"])]
)
def test_it_is_compressed_as_what_it_stands_for(
    published: tuple[Path, dict[str, Tensor]],
    dense: Path,
    tmp_path: Path,
    scheme: str,
    settings: list[str],
) -> None:
    outputs = []
    for number, model in enumerate((published[0], dense)):
        outputs.append(tmp_path / str(number))
        bitpress.compress(model, outputs[-1], scheme=scheme, settings=settings, more_bits=True)
    tensors, expected = map(tensors_of, outputs)
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor.view(torch.uint8), expected[name].view(torch.uint8)), name


def test_experts_in_fp4_come_to_nvfp4_without_a_second_rounding(
    published: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    model, weights = published
    settings = SETTINGS["nvfp4"]
    bitpress.compress(model, tmp_path / "out", scheme="nvfp4", settings=settings, more_bits=True)
    bitpress.decompress(tmp_path / "out", tmp_path / "again")
    again = tensors_of(tmp_path / "again")
    experts = [name for name in weights if ".experts." in name and not name.startswith("mtp.")]
    for name in experts:
        assert torch.equal(again[name], weights[name].bfloat16()), name


def test_an_engine_is_not_told_to_look_for_scales_of_fp4(
    published: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    bitpress.compress(published[0], tmp_path / "out", scheme="fp8", more_bits=True)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["expert_dtype"] == "fp8"
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"


@pytest.mark.parametrize("command", ["plan", "compress", "eval"])
def test_what_must_run_it_is_refused_before_a_folder_is_made(
    published: tuple[Path, dict[str, Tensor]], tmp_path: Path, command: str
) -> None:
    model = published[0]
    words = {
        "plan": ("--scheme", "w4a16", "--set", "group_size=32"),
        "compress": (tmp_path / "out", "--scheme", "w4a16", "--set", "group_size=32"),
        "eval": ("--text", model.parent / "text.txt", "--quiet"),
    }
    line = refusal(command, model, *words[command])
    assert "cannot be run yet; schemes and options that need no data can be used" in line
    assert not (tmp_path / "out").exists()
