"""A rotated model computes the same function, or is refused; and nothing downstream needs to know
that it is one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from fixtures.learner_scheme import CONFIG, LEARNER, runnable_model
from fixtures.small_models import small_config
from fixtures.toy_scheme import TOY
from fixtures.toy_source import install_toy_source
from safetensors.torch import save_file
from torch import Tensor

import bitpress
from bitpress.api import evaluate
from bitpress.checkpoint.reader import Reader, open_checkpoint
from bitpress.checkpoint.rotated_source import round_copies
from bitpress.checkpoint.source import resolve_source
from bitpress.conformance.commands import command, install, plugins, refusal
from bitpress.conformance.models import LLAMA, llama_tensors, tensors_of, write_model
from bitpress.errors import RecipeError
from bitpress.planning.rotation import ARCHITECTURES, rotate_source

# Toys with one more option.
OPTION = """
    rotate: bool = option(False, "rotate the model")

    @property
    def rotates(self): return self.rotate
"""
TURNED_TOY = TOY.replace("    @property\n", f"{OPTION}    @property\n", 1)
TURNED_LEARNER = LEARNER.replace("    @property\n", f"{OPTION}    @property\n", 1)
ENTRY_POINTS = "[bitpress.schemes]\ntoy = bitpress_scheme_toy\n"
CALIBRATION: Mapping[str, Any] = {"samples": 4, "sequence_length": 32, "threads": 1}
IDS = torch.arange(60).reshape(2, 30)


@pytest.fixture
def toy(tmp_path: Path) -> Iterator[Path]:
    folder = install(tmp_path / "plugins", "bitpress-scheme-toy", TURNED_TOY, ENTRY_POINTS)
    points = ENTRY_POINTS.replace("toy", "learner")
    install(folder, "bitpress-scheme-learner", TURNED_LEARNER, points)
    with plugins(folder):
        yield folder


def tied_model(folder: Path) -> Path:
    """A Llama with grouped heads, norms that are not 1, and a tied head."""
    config = {**CONFIG, "tie_word_embeddings": True}
    return runnable_model(folder, varied(llama_tensors(config=config)), config)


def varied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        name: (1 + torch.rand(tensor.shape)).bfloat16() if "norm" in name else tensor
        for name, tensor in tensors.items()
    }


def small_model(architecture: str, folder: Path, **keys: Any) -> Path:
    """A random model of an architecture, no two numbers of it alike."""
    torch.manual_seed(0)
    config = small_config(architecture)
    for key, value in keys.items():
        setattr(config, key, value)
    model = getattr(transformers, architecture)._from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    return folder


def logits(folder: Path) -> Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        result: Tensor = model.eval()(input_ids=IDS).logits
    return result


def write_rotated(source: Path, folder: Path) -> Path:
    """The rotated model as a folder of its own, in float32."""
    rotated = rotate_source(resolve_source(open_checkpoint(source)))
    with Reader() as reader:
        tensors = {n: reader.whole(e).contiguous().clone() for n, e in rotated.entries.items()}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(rotated.config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("architecture", "is_tied"),
    [("LlamaForCausalLM", False), *((architecture, True) for architecture in ARCHITECTURES)],
)
def test_a_rotated_model_computes_the_same_function(
    architecture: str, is_tied: bool, tmp_path: Path
) -> None:
    source = small_model(architecture, tmp_path / "source", tie_word_embeddings=is_tied)
    rotated = write_rotated(source, tmp_path / "rotated")
    assert (logits(source) - logits(rotated)).abs().max() < 1e-4
    before, after = tensors_of(source), tensors_of(rotated)
    name = "model.layers.0.self_attn.v_proj.weight"
    assert (before[name] - after[name]).norm() > before[name].norm()
    norms = [tensor for name, tensor in after.items() if name.endswith("layernorm.weight")]
    assert norms
    assert all((norm == 1).all() for norm in norms)


def test_biases_are_rotated_too(tmp_path: Path) -> None:
    keys = {"attention_bias": True, "mlp_bias": True}
    source = small_model("LlamaForCausalLM", tmp_path / "source", **keys)
    rotated = write_rotated(source, tmp_path / "rotated")
    assert (logits(source) - logits(rotated)).abs().max() < 1e-4


def test_a_width_that_is_no_power_of_two_is_rotated_in_blocks(tmp_path: Path) -> None:
    sizes = {"hidden_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24}
    source = small_model("LlamaForCausalLM", tmp_path / "source", **sizes)
    rotated = write_rotated(source, tmp_path / "rotated")
    assert (logits(source) - logits(rotated)).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("architecture", "fact"),
    [
        ("Olmo2ForCausalLM", "a norm whose output is added to them"),
        ("Gemma2ForCausalLM", "a norm whose output is added to them"),
        ("GemmaForCausalLM", "it is not known whether GemmaForCausalLM allows it"),
        ("Phi3ForCausalLM", "it is not known whether Phi3ForCausalLM allows it"),
        ("StableLmForCausalLM", "the bias of a norm, which subtracts a mean"),
    ],
)
def test_a_model_whose_function_would_change_is_refused(
    architecture: str, fact: str, tmp_path: Path
) -> None:
    source = small_model(architecture, tmp_path / "source")
    with pytest.raises(RecipeError, match=fact) as error:
        rotate_source(resolve_source(open_checkpoint(source)))
    assert str(source) in str(error.value)
    assert "rotate=none" in str(error.value)


def test_a_tensor_that_is_not_known_is_refused(tmp_path: Path, toy: Path) -> None:
    tensors = llama_tensors() | {"model.layers.0.self_attn.sinks": torch.zeros(4)}
    model = write_model(tmp_path / "model", tensors)
    line = refusal("plan", model, "--scheme", "toy", "--set", "rotate=true", path=toy)
    assert "model.layers.0.self_attn.sinks" in line


def test_rows_are_the_same_however_they_are_read(tmp_path: Path) -> None:
    source = rotate_source(resolve_source(open_checkpoint(tied_model(tmp_path / "model"))))
    source = round_copies(source, ["model.layers.0.self_attn.v_proj"])
    for entry in source.entries.values():
        with Reader() as reader:
            whole = reader.whole(entry)
            rows = [reader.rows(entry, i, min(i + 5, len(whole))) for i in range(0, len(whole), 5)]
            assert torch.equal(torch.cat(rows), whole)
            chunks = list(reader.chunks(entry, 1000))
            stored = whole.bfloat16().reshape(-1).view(torch.uint8)
            assert torch.equal(torch.cat(chunks), stored)
            assert {len(chunk) for chunk in chunks[:-1]} <= {1000}
    dtypes = {}
    with Reader() as reader:
        dtypes = {name: reader.rows(entry, 0, 1).dtype for name, entry in source.entries.items()}
    exact = [name for name, dtype in dtypes.items() if dtype == torch.float32]
    assert exact == ["model.layers.0.self_attn.v_proj.weight"]


@pytest.mark.parametrize("scheme", ["toy", "learner"])
@pytest.mark.parametrize("max_memory", [None, "1GB"])
def test_an_output_is_planned_proved_and_decompressed_as_any_other(
    scheme: str, max_memory: str | None, tmp_path: Path, toy: Path
) -> None:
    model, out, dense = tied_model(tmp_path / "model"), tmp_path / "out", tmp_path / "dense"
    options: dict[str, Any] = {"scheme": scheme, "settings": ["rotate=true"]}
    plan = bitpress.plan(model, **options)
    assert any("lm_head.weight is stored beside the embeddings" in line for line in plan.warnings)
    if scheme == "learner":
        options |= {"calibration": tmp_path / "text.txt", **CALIBRATION}
    bitpress.compress(model, out, max_memory=max_memory, **options)
    assert plan.file_sizes["model.safetensors" if scheme == "toy" else plan.shards[0].name] == (
        (out / plan.shards[0].name).stat().st_size
    )
    report = bitpress.verify(out, model)
    assert not report.faults
    assert max(report.errors.values()) < 0.02
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False

    # what loaders compute with, and what the source computes
    bitpress.decompress(out, dense)
    restored, expected = logits(dense), logits(model)
    assert (restored - expected).norm() < 0.05 * expected.norm()
    assert "quantization_config" not in json.loads((dense / "config.json").read_text())
    stored = tensors_of(dense)
    assert stored["lm_head.weight"].dtype == torch.bfloat16
    assert not torch.equal(stored["lm_head.weight"], stored["model.embed_tokens.weight"])
    check = evaluate(out, tmp_path / "text.txt", model, sequence_length=32, max_tokens=256)
    assert check.kl is not None
    assert check.kl < 0.01


def test_layers_that_are_left_alone_are_rotated_with_the_others(tmp_path: Path, toy: Path) -> None:
    model, out = tied_model(tmp_path / "model"), tmp_path / "out"
    bitpress.compress(
        model,
        out,
        scheme="toy",
        settings=["rotate=true"],
        ignore=["*.down_proj", "*.0.self_attn.*"],
    )
    assert not bitpress.verify(out, model).faults
    name = "model.layers.0.mlp.down_proj.weight"
    assert not torch.equal(tensors_of(out)[name], tensors_of(model)[name])


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"])
def test_verify_finds_a_tensor_that_is_destroyed(name: str, tmp_path: Path, toy: Path) -> None:
    model, out = tied_model(tmp_path / "model"), tmp_path / "out"
    bitpress.compress(model, out, scheme="toy", settings=["rotate=true"])
    other = tied_model(tmp_path / "other")
    tensors = tensors_of(other)
    tensors[name] = tensors[name].flip(0).contiguous()
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    subjects = {fault.subject for fault in bitpress.verify(out, other).faults}
    expected = {name} if "embed" in name else {name.removesuffix(".weight")}
    # the head is made of the embeddings
    assert subjects - {"lm_head.weight"} == expected


def test_a_run_resumes_to_the_same_bytes(tmp_path: Path, toy: Path) -> None:
    model = tied_model(tmp_path / "model")
    options: dict[str, Any] = {
        "scheme": "learner",
        "calibration": tmp_path / "text.txt",
        "ignore": ["*.1.mlp.down_proj"],
        **CALIBRATION,
    }
    bitpress.compress(model, tmp_path / "whole", settings=["rotate=true"], **options)
    # the process is interrupted in the last block
    file = tmp_path / "int.9"
    settings = ["rotate=true", f"deadly={file}"]
    parts_folder = tmp_path / "parts"
    with pytest.raises(KeyboardInterrupt):
        bitpress.compress(model, parts_folder, settings=settings, **options)
    assert list(parts_folder.glob("*.safetensors"))
    bitpress.compress(model, parts_folder, settings=settings, **options)
    whole, parts = tensors_of(tmp_path / "whole"), tensors_of(parts_folder)
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_search_compares_candidates_in_the_rotated_model(tmp_path: Path, toy: Path) -> None:
    model, recipe = tied_model(tmp_path / "model"), tmp_path / "recipe.toml"
    bitpress.search(
        model,
        recipe,
        schemes=["toy:rotate=true", "none"],
        budget=12,
        calibration=tmp_path / "text.txt",
        **CALIBRATION,
    )
    assert "rotate = true" in recipe.read_text()
    bitpress.compress(model, tmp_path / "out", recipe=recipe)
    assert not bitpress.verify(tmp_path / "out", model).faults


def test_a_plan_says_that_the_other_tensors_are_rotated(tmp_path: Path, toy: Path) -> None:
    model = write_model(tmp_path / "model")
    words = ["plan", model, "--scheme", "toy", "--set"]
    assert "tensors rotated alone" in command(*words, "rotate=true", path=toy).stdout
    assert "tensors copied unchanged" in command(*words, "rotate=false", path=toy).stdout


def test_a_quantized_source_is_rotated_as_what_it_stands_for(tmp_path: Path, toy: Path) -> None:
    tensors = varied(llama_tensors())
    name = "model.layers.0.self_attn.o_proj"
    steps = torch.full((tensors[f"{name}.weight"].shape[0], 1), 2.0**-7)
    codes = (tensors[f"{name}.weight"].float() / steps).round().clamp(-127, 127).char()
    weight = {f"{name}.weight": (codes * steps).bfloat16()}
    plain = write_model(tmp_path / "plain", tensors | weight)
    del tensors[f"{name}.weight"]
    stored = {f"{name}.codes": codes, f"{name}.steps": steps}
    config = {**LLAMA, "quantization_config": {"quant_method": "toy"}}
    coded = write_model(tmp_path / "coded", tensors | stored, config)
    with plugins(install_toy_source(toy)):
        for model in (plain, coded):
            out = tmp_path / f"{model.name}-out"
            bitpress.compress(model, out, scheme="toy", settings=["rotate=true"])
    first, second = tensors_of(tmp_path / "plain-out"), tensors_of(tmp_path / "coded-out")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_head_that_is_missing_is_not_taken_for_a_tied_one(tmp_path: Path, toy: Path) -> None:
    tensors = llama_tensors()
    del tensors["lm_head.weight"]
    model = write_model(tmp_path / "model", tensors)
    words = [model, "--scheme", "toy", "--set", "rotate=true"]
    assert "it has no lm_head.weight" in refusal("plan", *words, path=toy)


def test_shards_of_the_source_are_rotated_one_by_one(tmp_path: Path, toy: Path) -> None:
    one = write_model(tmp_path / "one", varied(llama_tensors()))
    three = write_model(tmp_path / "three", varied(llama_tensors()), LLAMA, shards=3)
    for model in (one, three):
        words = [model, tmp_path / f"{model.name}-out", "--scheme", "toy", "--set", "rotate=true"]
        assert command("compress", *words, path=toy).returncode == 0
    first, second = tensors_of(tmp_path / "one-out"), tensors_of(tmp_path / "three-out")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
