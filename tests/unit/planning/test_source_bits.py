"""More bits bring nothing back that a source has lost: they must be asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from fixtures.toy_scheme import install_toy
from fixtures.toy_source import install_toy_source

import bitpress
from bitpress.conformance.commands import command, plugins, refusal
from bitpress.conformance.models import LLAMA, llama_tensors, tensors_of, write_model

LAYER = "model.layers.1.mlp.down_proj"
QUANTIZED = {**LLAMA, "quantization_config": {"quant_method": "toy"}}


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    return install_toy_source(install_toy(tmp_path / "plugins"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model with one layer in 8 bits."""
    tensors = llama_tensors()
    weight = tensors.pop(f"{LAYER}.weight").float()
    codes, steps = (weight * 300).clamp(-127, 127).char(), torch.full((len(weight), 1), 1 / 300)
    stored = {f"{LAYER}.codes": codes, f"{LAYER}.steps": steps}
    return write_model(tmp_path / "model", tensors | stored, QUANTIZED)


def test_a_plan_says_what_the_source_has_lost_and_what_grows(model: Path, installed: Path) -> None:
    with plugins(installed):
        lost = bitpress.plan(model, scheme="toy").warnings
        grown = bitpress.plan(model, scheme="toy", ignore=[LAYER]).warnings
    assert [line for line in lost if "what they lost stays lost" in line]
    assert not [line for line in lost if "become BF16" in line]
    assert [line for line in grown if f"become BF16 (0.00 GB more, first: {LAYER}.weight)" in line]


def test_more_bits_than_the_source_has_are_refused_unless_asked_for(
    model: Path, installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the toy scheme stores 8 bits as its source does: let nothing grow, scales included
    monkeypatch.setattr("bitpress.planning.source_bits.MAX_GROWTH", 0.9)
    line = refusal("plan", model, "--scheme", "toy", path=installed)
    assert f"layer {LAYER}: the source holds it in 8.12 bits per weight (toy codes)" in line
    assert "--more-bits" in line
    assert command("plan", model, "--scheme", "toy", "--more-bits", path=installed).returncode == 0
    with plugins(installed):
        assert bitpress.plan(model, scheme="toy", more_bits=True).recipe.more_bits


def test_a_source_is_decompressed_to_what_it_stands_for(
    tmp_path: Path, model: Path, installed: Path
) -> None:
    (model / "LICENSE").write_text("free")
    done = command("decompress", model, tmp_path / "dense", path=installed)
    assert done.returncode == 0, done.stderr
    tensors, stored = tensors_of(tmp_path / "dense"), tensors_of(model)
    weight = (stored[f"{LAYER}.codes"].float() * stored[f"{LAYER}.steps"]).bfloat16()
    assert torch.equal(tensors[f"{LAYER}.weight"], weight)
    assert tensors.keys() == llama_tensors().keys()
    for name in tensors.keys() - {f"{LAYER}.weight"}:
        assert torch.equal(tensors[name], stored[name]), name
    assert "quantization_config" not in (tmp_path / "dense/config.json").read_text()
    assert (tmp_path / "dense/LICENSE").read_text() == "free"


def test_a_plain_model_is_not_decompressed(tmp_path: Path, installed: Path) -> None:
    plain = write_model(tmp_path / "plain")
    line = refusal("decompress", plain, tmp_path / "dense", path=installed)
    assert "was not written by bitpress" in line
    assert not (tmp_path / "dense").exists()


def test_a_source_is_inspected(model: Path, installed: Path) -> None:
    done = command("inspect", model, path=installed)
    assert done.returncode == 0, done.stderr
    assert "toy codes: 1 weights of 8.12 bits on average, scales included" in done.stdout
    assert f"{LAYER}.weight" in done.stdout
    shown = json.loads(command("inspect", model, "--json", path=installed).stdout)
    assert shown["method"] == "toy codes"
    assert shown["weights"][f"{LAYER}.weight"]["shape"] == [128, 256]


def test_a_source_is_verified(model: Path, tmp_path: Path, installed: Path) -> None:
    assert command("verify", model, path=installed).returncode == 0
    tensors = {name: tensor.clone() for name, tensor in tensors_of(model).items()}
    tensors[f"{LAYER}.steps"][3] = float("nan")
    broken = write_model(tmp_path / "broken", tensors, QUANTIZED)
    done = command("verify", broken, path=installed)
    assert done.returncode == 1
    assert f"{LAYER}.weight: it is decoded to NaN or infinity" in done.stderr


@pytest.mark.parametrize("words", [["inspect"], ["verify"], ["decompress", "dense"]])
def test_without_a_package_that_reads_it_a_source_is_refused_with_the_package(
    model: Path, tmp_path: Path, words: list[str]
) -> None:
    others = [tmp_path / word for word in words[1:]]
    line = refusal(words[0], model, *others, path=install_toy(tmp_path / "toy alone"))
    assert "was not written by bitpress" in line
    assert "pip install bitpress-sources" in line
