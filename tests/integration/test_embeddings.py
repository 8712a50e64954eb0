"""Embeddings are compressed where they are named, in a format in which vLLM looks up rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from fixtures.small_models import build_small_model
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

import bitpress
from bitpress.checkpoint.model_config import KEY
from bitpress.conformance.commands import command, refusal
from bitpress.conformance.models import tensors_of

EMBEDDINGS = "model.embed_tokens"
SETTINGS = ["w8a16.group_size=32"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose class in vLLM looks for its embeddings in the config."""
    return build_small_model("Qwen3ForCausalLM", tmp_path_factory.mktemp("qwen3") / "m")


@pytest.mark.parametrize("scheme", ["w8a16", "fp8"], ids=["as the layers", "alone"])
def test_embeddings_that_are_named_are_compressed(tmp_path: Path, model: Path, scheme: str) -> None:
    out = tmp_path / "o"
    bitpress.compress(model, out, scheme=scheme, embeddings="w8a16", settings=SETTINGS)
    before, after = tensors_of(model)[f"{EMBEDDINGS}.weight"].float(), tensors_of(out)
    assert f"{EMBEDDINGS}.weight" not in after
    groups = json.loads((out / "config.json").read_text())[KEY]["config_groups"].values()
    assert [EMBEDDINGS in group["targets"] for group in groups].count(True) == 1
    assert not bitpress.verify(out, against=model).faults

    bitpress.decompress(out, tmp_path / "back")
    restored = tensors_of(tmp_path / "back")[f"{EMBEDDINGS}.weight"].float()
    step = after[f"{EMBEDDINGS}.weight_scale"].float().repeat_interleave(32, dim=1)
    # half a step, and the rounding of the decompressed number to bfloat16
    assert ((restored - before).abs() <= 0.501 * step + 2**-8 * before.abs()).all()


def test_other_layers_leave_embeddings_alone(tmp_path: Path, model: Path) -> None:
    bitpress.compress(model, tmp_path / "o", scheme="w8a16", settings=SETTINGS)
    name = f"{EMBEDDINGS}.weight"
    assert torch.equal(tensors_of(tmp_path / "o")[name], tensors_of(model)[name])


def test_eval_sees_that_embeddings_are_rounded(tmp_path: Path, model: Path) -> None:
    text = model.parent / "text.txt"
    kls = []
    for name, embeddings in (("plain", None), ("both", "w4a16")):
        bitpress.compress(
            model,
            tmp_path / name,
            scheme="w8a16",
            embeddings=embeddings,
            settings=[*SETTINGS, *(["w4a16.group_size=32"] if embeddings else [])],
        )
        check = bitpress.eval(
            tmp_path / name, text=text, against=model, sequence_length=32, max_tokens=960
        )
        assert check.kl is not None
        kls.append(check.kl)
    assert kls[1] > 1.5 * kls[0] > 0


def test_transformers_reads_embeddings_that_it_dequantizes(tmp_path: Path, model: Path) -> None:
    out = tmp_path / "o"
    bitpress.compress(model, out, scheme="w8a16", embeddings="w8a16", settings=SETTINGS)
    bitpress.decompress(out, tmp_path / "back")
    config = CompressedTensorsConfig(dequantize=True)
    read = AutoModelForCausalLM.from_pretrained(out, quantization_config=config)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert torch.equal(read.get_input_embeddings().weight, expected.get_input_embeddings().weight)
    assert "CompressedTensorsConfig(dequantize=True)" in (out / "README.md").read_text()


def test_the_card_says_where_transformers_does_not_read_them(tmp_path: Path, model: Path) -> None:
    out = tmp_path / "o"
    bitpress.compress(model, out, scheme="fp8", embeddings="w8a16", settings=SETTINGS)
    assert (
        "Not known to load in transformers: it reads compressed" in (out / "README.md").read_text()
    )


def test_plan_says_what_embeddings_take_that_could_be_compressed(model: Path) -> None:
    offer = "of embeddings stay as they are: --embeddings NAME compresses them"
    assert offer in command("plan", model, "--scheme", "fp8").stdout
    words = ["plan", model, "--scheme", "fp8", "--embeddings", "w8a16", "--set", *SETTINGS]
    assert offer not in command(*words).stdout


def test_a_format_in_which_vllm_looks_up_no_rows_is_refused(model: Path) -> None:
    line = refusal("plan", model, "--scheme", "fp8", "--embeddings", "fp8")
    assert "vLLM reads embeddings in symmetric packed integers alone" in line


def test_a_class_that_does_not_look_for_them_is_refused(tmp_path: Path) -> None:
    llama = build_small_model("LlamaForCausalLM", tmp_path / "m")
    line = refusal("plan", llama, "--scheme", "fp8", "--embeddings", "w8a16")
    assert "vLLM 0.33.0 looks for it under no name" in line


def test_embeddings_to_which_the_head_is_tied_are_refused(tmp_path: Path, model: Path) -> None:
    tied = build_small_model("Qwen3ForCausalLM", tmp_path / "m")
    config = json.loads((tied / "config.json").read_text())
    (tied / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    line = refusal("plan", tied, "--scheme", "fp8", "--embeddings", "w8a16")
    assert "the head is tied to the embeddings" in line
