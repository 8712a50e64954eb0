"""Experts in one tensor are cut into the layers that engines read, where shape and config leave no
doubt how, or named.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.toy_scheme import install_toy
from fixtures.toy_source import TOY_SOURCE, install_toy_source

import bitpress
from bitpress.checkpoint.engine_facts import NamePatterns
from bitpress.conformance.commands import command, plugins, refusal
from bitpress.conformance.models import LLAMA, files_of, llama_tensors, tensors_of, write_model

EXPERTS, HIDDEN, WIDE = 3, 128, 32
CONFIG = LLAMA | {
    "num_local_experts": EXPERTS,
    "moe_intermediate_size": WIDE,
    "num_hidden_layers": 1,
}
MODULE = "model.layers.0.mlp.experts"
# What engines read expert by expert, and what they do not.
FUSED, APART = "Qwen3_5MoeForCausalLM", "Qwen3MoeForCausalLM"

# Of an architecture the tensors of gate and up, and of down, and what vLLM calls the experts.
ARCHITECTURES = {
    FUSED: (f"{MODULE}.gate_up_proj", f"{MODULE}.down_proj", MODULE),
    "Llama4ForCausalLM": (
        "model.layers.0.feed_forward.experts.gate_up_proj",
        "model.layers.0.feed_forward.experts.down_proj",
        "model.layers.0.feed_forward.experts",
    ),
    "Gemma4ForCausalLM": (
        "model.layers.0.experts.gate_up_proj",
        "model.layers.0.experts.down_proj",
        "model.layers.0.experts",
    ),
    "GraniteMoeForCausalLM": (
        "model.layers.0.block_sparse_moe.input_linear.weight",
        "model.layers.0.block_sparse_moe.output_linear.weight",
        "model.layers.0.block_sparse_moe.experts",
    ),
}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install_toy(tmp_path_factory.mktemp("plugins"))


def tensors(
    transposed: bool,
    extra: Mapping[str, torch.Tensor] | None = None,
    architecture: str = FUSED,
) -> dict[str, torch.Tensor]:
    """A block's attention, and its experts' weights, (out, in) or (in, out), in two tensors."""
    generator = torch.Generator().manual_seed(1)
    both = torch.randn(EXPERTS, 2 * WIDE, HIDDEN, generator=generator).bfloat16()
    down = torch.randn(EXPERTS, HIDDEN, WIDE, generator=generator).bfloat16()
    result = {n: t for n, t in llama_tensors(config=CONFIG).items() if ".mlp." not in n}
    gate_up_name, down_name, _ = ARCHITECTURES[architecture]
    for name, tensor in ((gate_up_name, both), (down_name, down)):
        result[name] = tensor.mT.contiguous() if transposed else tensor
    return result | dict(extra or {})


def one_by_one(module: str = MODULE) -> dict[str, torch.Tensor]:
    """The same experts as layers of their own."""
    result = tensors(False)
    both, down = result.pop(f"{MODULE}.gate_up_proj"), result.pop(f"{MODULE}.down_proj")
    for e in range(EXPERTS):
        parts = {"gate_proj": both[e, :WIDE], "up_proj": both[e, WIDE:], "down_proj": down[e]}
        result |= {f"{module}.{e}.{leaf}.weight": part.contiguous() for leaf, part in parts.items()}
    return result


def config(architecture: str, **keys: Any) -> dict[str, Any]:
    return CONFIG | {"architectures": [architecture]} | keys


@pytest.mark.parametrize("transposed", [False, True], ids=["out, in", "in, out"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fused_experts_become_what_layers_of_their_own_become(
    tmp_path: Path, toy: Path, architecture: str, transposed: bool
) -> None:
    both = tensors(transposed, architecture=architecture)
    fused = write_model(tmp_path / "fused", both, config(architecture), shards=2)
    layers = one_by_one(ARCHITECTURES[architecture][2])
    apart = write_model(tmp_path / "apart", layers, config(architecture))
    with plugins(toy):
        for source in (fused, apart):
            bitpress.compress(source, tmp_path / f"{source.name}-out", scheme="toy")
    written, expected = tensors_of(tmp_path / "fused-out"), tensors_of(tmp_path / "apart-out")
    assert written.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(written[name], tensor), name
    assert command("verify", tmp_path / "fused-out", "--against", fused, path=toy).returncode == 0


def test_more_threads_write_the_same_bytes(tmp_path: Path, toy: Path) -> None:
    fused = write_model(tmp_path / "m", tensors(True), config(FUSED))
    with plugins(toy):
        for threads in (1, 3):
            bitpress.compress(fused, tmp_path / f"{threads}", scheme="toy", threads=threads)
    assert files_of(tmp_path / "1") == files_of(tmp_path / "3")


def test_experts_of_which_none_is_compressed_stay_fused(tmp_path: Path, toy: Path) -> None:
    source = write_model(tmp_path / "m", tensors(True), config(FUSED))
    with plugins(toy):
        bitpress.compress(source, tmp_path / "o", scheme="toy", ignore=["*.experts.*"])
        ignored = bitpress.plan(source, scheme="toy", ignore=["*.experts.*"]).config[
            "quantization_config"
        ]["ignore"]
    for name in (f"{MODULE}.gate_up_proj", f"{MODULE}.down_proj"):
        assert torch.equal(tensors_of(tmp_path / "o")[name], tensors_of(source)[name])
    # engines ask for the experts by other names
    assert {MODULE, r"re:.*\.0\.mlp\.experts(\..+)?$"} <= set(ignored)
    assert command("verify", tmp_path / "o", "--against", source, path=toy).returncode == 0


def test_attention_with_as_many_heads_as_experts_is_no_expert(tmp_path: Path, toy: Path) -> None:
    decay = {"model.layers.0.self_attn.slope_rate": torch.ones(EXPERTS, 1, 1).bfloat16()}
    source = write_model(tmp_path / "m", tensors(False, decay), config(FUSED))
    with plugins(toy):
        bitpress.compress(source, tmp_path / "o", scheme="toy")
    assert command("verify", tmp_path / "o", "--against", source, path=toy).returncode == 0
    assert torch.equal(*(tensors_of(tmp_path / f)[next(iter(decay))] for f in ("m", "o")))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_engines_find_experts_that_stay_as_they_are_under_their_own_names(
    tmp_path: Path, toy: Path, architecture: str
) -> None:
    *stacks, parent = ARCHITECTURES[architecture]
    source = write_model(
        tmp_path / "m", tensors(False, architecture=architecture), config(architecture)
    )
    with plugins(toy):
        ignored = bitpress.plan(source, scheme="toy", ignore=[f"{parent}.*"]).config[
            "quantization_config"
        ]["ignore"]
    assert not any(name in ignored for name in stacks)
    assert NamePatterns.parse(ignored).match(f"{parent}.0.gate_proj")


NEITHER = {f"{MODULE}.gate_up_proj": torch.zeros(EXPERTS, HIDDEN, WIDE).bfloat16()}
REFUSED = {
    "one way in one, the other in the other": (
        FUSED,
        {f"{MODULE}.down_proj": torch.zeros(EXPERTS, HIDDEN, WIDE).bfloat16()},
        {},
        ["neither", "[3, 128, 64]"],
    ),
    "shapes that the config does not explain": (
        FUSED,
        NEITHER,
        {},
        [f"{MODULE}.gate_up_proj", "[3, 128, 32]"],
    ),
    "a config without a width": (
        FUSED,
        {},
        {"moe_intermediate_size": None, "intermediate_size": None},
        ["0 of an"],
    ),
    "gpt-oss": ("GptOssForCausalLM", {}, {}, ["vLLM 0.33.0: its loader reads", "MXFP4"]),
    "a model that nobody knows": (
        "NovelForCausalLM",
        {},
        {},
        ["no engine is known", "NovelForCausalLM"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_cut_is_refused_by_name_and_can_be_left_out(
    tmp_path: Path, toy: Path, case: str
) -> None:
    architecture, extra, keys, words = REFUSED[case]
    source = write_model(tmp_path / "m", tensors(True, extra), config(architecture, **keys))
    line = refusal("plan", source, "--scheme", "toy", path=toy)
    assert all(word in line for word in [MODULE, "--ignore '*.experts'", *words]), line
    assert (
        command(
            "compress", source, tmp_path / "o", "--scheme", "toy", "--ignore", "*.experts", path=toy
        ).returncode
        == 0
    )
    assert tensors_of(tmp_path / "o")[f"{MODULE}.down_proj"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    "pattern", ["*.experts.1.*", "*.experts.*.down_proj", "*.experts.*.gate_proj"]
)
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "apart"])
def test_experts_of_a_block_share_their_steps(
    tmp_path: Path, toy: Path, pattern: str, fused: bool
) -> None:
    case = (tensors(True), config(FUSED)) if fused else (one_by_one(), config(APART))
    line = refusal(
        "plan", write_model(tmp_path / "m", *case), "--scheme", "toy", "--ignore", pattern, path=toy
    )
    assert f"{MODULE}.0." in line
    assert "must get the same steps" in line


def test_the_result_decompresses_to_layers_of_their_own(tmp_path: Path, toy: Path) -> None:
    source = write_model(tmp_path / "m", tensors(True), config(FUSED))
    with plugins(toy):
        bitpress.compress(source, tmp_path / "o", scheme="toy")
        bitpress.decompress(tmp_path / "o", tmp_path / "dense")
    expected = one_by_one()
    for name, tensor in tensors_of(tmp_path / "dense").items():
        assert torch.allclose(
            tensor.float(), expected[name].float(), atol=float(expected[name].abs().max()) / 120
        ), name


def test_fused_experts_in_fewer_bits_are_not_cut_by_bytes(tmp_path: Path) -> None:
    gate_up_name, down_name, module = ARCHITECTURES[FUSED]
    stored = tensors(False)
    for name in (gate_up_name, down_name):
        codes = (stored.pop(name).float() * 20).clamp(-127, 127).char()
        stored |= {f"{name}.codes": codes, f"{name}.steps": torch.ones(len(codes), 1, 1)}
    whole = TOY_SOURCE.replace('f"{module}.weight"]', "module]").replace(
        'QuantizedTensor(parts["codes"], parts["steps"])',
        'parts["codes"].float() * parts["steps"]',
    )
    plugins_folder = install_toy_source(install_toy(tmp_path / "plugins"), whole)
    quantized = {"quantization_config": {"quant_method": "toy"}}
    model = write_model(tmp_path / "m", stored, config(FUSED, **quantized))
    line = refusal("plan", model, "--scheme", "toy", path=plugins_folder)
    assert f"the experts {module} cannot be compressed" in line
    assert "quantized" in line
