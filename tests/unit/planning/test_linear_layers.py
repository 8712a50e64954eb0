"""Which tensors are linear layers of the decoder blocks, and which of them engines fuse, known from
names and shapes alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from attrs import field, frozen

from bitpress import CheckpointError
from bitpress.checkpoint.engine_facts import NamePatterns, facts_of
from bitpress.checkpoint.reader import Checkpoint
from bitpress.checkpoint.safetensors import Entry
from bitpress.planning.ignored_layers import ignored_layers
from bitpress.planning.linear_layers import group_fused, linear_layers

Shapes = Mapping[str, tuple[int, ...]]


def checkpoint(
    tensors: Shapes, config: Mapping[str, Any] | None = None, files: int = 1, dtype: str = "BF16"
) -> Checkpoint:
    """A checkpoint of these shapes; with several files, tensors are dealt out in turn."""
    names = [name for file in range(files) for name in list(tensors)[file::files]]
    places = {name: Path(f"model-{i % files}") for i, name in enumerate(tensors)}
    entries = {name: Entry(name, dtype, tensors[name], places[name], 0) for name in names}
    return Checkpoint(
        Path("model"), {"num_hidden_layers": 2} if config is None else config, {}, entries, ()
    )


def block(
    prefix: str,
    *layers: str,
    norms: tuple[str, ...] = ("input_layernorm",),
    shape: tuple[int, int] = (16, 8),
) -> Shapes:
    """The tensors of one block."""
    return {f"{prefix}.{n}.weight": (8,) for n in norms} | {
        f"{prefix}.{layer}.weight": shape for layer in layers
    }


ATTENTION = tuple(f"self_attn.{n}_proj" for n in "qkvo")
MLP = tuple(f"mlp.{n}_proj" for n in ("gate", "up", "down"))
MLA = tuple(
    f"self_attn.{n}" for n in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
)
EDGES = {"model.embed_tokens.weight": (32, 8), "model.norm.weight": (8,), "lm_head.weight": (32, 8)}
QKV, GATE_UP = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("mlp.gate_proj", "mlp.up_proj"),
)
VISION = block("model.visual.blocks.0", "attn.qkv", "mlp.linear_fc1", shape=(900, 900))


@frozen
class Case:
    """A model's tensors beside its decoder blocks, and stacks: the fused and the single layers of
    each block.
    """

    stacks: tuple[tuple[str, ...], ...]
    beside: Shapes = field(factory=dict)
    in_block: Shapes = field(factory=dict)
    container: str = "model.layers"
    config: Mapping[str, Any] | None = None

    @property
    def tensors(self) -> Shapes:
        result: dict[str, tuple[int, ...]] = {**EDGES, **self.beside}
        for i in (0, 1):
            result |= block(f"{self.container}.{i}", *(layer for s in self.stacks for layer in s))
            result |= {
                f"{self.container}.{i}.{name}": shape for name, shape in self.in_block.items()
            }
        return result

    @property
    def expected(self) -> set[tuple[str, ...]]:
        return {
            tuple(f"{self.container}.{i}.{layer}" for layer in s)
            for s in self.stacks
            for i in (0, 1)
        }


def alone(*layers: str) -> tuple[tuple[str, ...], ...]:
    return tuple((layer,) for layer in layers)


LLAMA = (QKV, *alone("self_attn.o_proj"), GATE_UP, *alone("mlp.down_proj"))
CASES = {
    "a Llama": Case(LLAMA),
    "with biases and norms of heads": Case(
        LLAMA, in_block={"self_attn.q_proj.bias": (16,), "self_attn.q_norm.weight": (8,)}
    ),
    "projections fused on disk": Case(
        alone("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    ),
    "names that nobody fuses": Case(
        alone("attention.query_key_value", "mlp.dense_h_to_4h"), container="gpt_neox.layers"
    ),
    "keys and values shared across blocks": Case(
        alone("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
    ),
    "latent attention": Case(
        (
            ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"),
            *alone(*MLA[1::2], "self_attn.o_proj"),
            GATE_UP,
        ),
    ),
    "latent attention without a query rank": Case(
        alone("self_attn.q_proj", "self_attn.kv_a_proj_with_mqa", *MLA[3:])
    ),
    "Mixtral's experts": Case(
        (
            QKV,
            *(
                (f"block_sparse_moe.experts.{e}.w1", f"block_sparse_moe.experts.{e}.w3")
                for e in (0, 1)
            ),
            *alone(*(f"block_sparse_moe.experts.{e}.w2" for e in (0, 1))),
        ),
        in_block={"block_sparse_moe.gate.weight": (2, 8)},
    ),
    "experts with gate and up, and a shared one": Case(
        (
            QKV,
            *((f"mlp.experts.{e}.gate_proj", f"mlp.experts.{e}.up_proj") for e in (0, 1)),
            *alone("mlp.experts.0.down_proj", "mlp.experts.1.down_proj"),
            ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
            *alone("mlp.shared_expert.down_proj"),
        ),
        in_block={
            "mlp.gate.weight": (2, 8),
            "mlp.shared_expert_gate.weight": (1, 8),
            "mlp.router.weight": (2, 8),
        },
    ),
    "experts fused in one tensor": Case(
        (QKV, *alone("self_attn.o_proj")),
        in_block={"mlp.experts.gate_up_proj": (2, 8, 32), "mlp.experts.down_proj": (2, 16, 8)},
    ),
    "convolutions and states of linear attention": Case(
        alone("linear_attn.in_proj_qkvz", "linear_attn.out_proj"),
        in_block={
            "linear_attn.conv1d.weight": (16, 1, 4),
            "linear_attn.A_log": (4,),
            "linear_attn.dt_bias": (4,),
        },
    ),
    "multi-token prediction as a block beyond the count": Case(
        LLAMA, block("model.layers.2", *ATTENTION, *MLP, "eh_proj")
    ),
    "multi-token prediction under its own name": Case(
        LLAMA, block("mtp.layers.0", *ATTENTION, *MLP)
    ),
    "a vision tower larger than the decoder": Case(
        LLAMA,
        {
            **VISION,
            "model.visual.merger.linear_fc1.weight": (8, 8),
            "multi_modal_projector.linear_1.weight": (8, 8),
        },
        container="model.language_model.layers",
        config={"text_config": {"num_hidden_layers": 2}},
    ),
    "an audio tower": Case(LLAMA, block("audio_tower.layers.0", *ATTENTION, shape=(900, 900))),
    "a config that counts no blocks": Case(LLAMA, config={}),
}


@pytest.mark.parametrize("files", [1, 2, 3], ids=lambda n: f"{n} files")
@pytest.mark.parametrize("name", CASES)
def test_layers_and_stacks_are_those_that_engines_quantize_and_fuse(name: str, files: int) -> None:
    case = CASES[name]
    layers = linear_layers(checkpoint(case.tensors, case.config, files))
    assert set(group_fused(layers)) == case.expected
    assert set(layers) == {layer for members in case.expected for layer in members}


def test_a_stack_comes_where_its_first_member_lies_and_keeps_the_engine_s_order() -> None:
    backwards = dict(reversed(block("model.layers.0", *ATTENTION).items()))
    assert group_fused(linear_layers(checkpoint(backwards))) == [
        ("model.layers.0.self_attn.o_proj",),
        tuple(f"model.layers.0.self_attn.{n}_proj" for n in "qkv"),
    ]


def test_layers_that_only_one_model_s_engine_fuses_are_one_stack() -> None:
    # Cosmos 3 calls them so, and vLLM makes `qkv_proj` of them.
    config = {"architectures": ["Cosmos3EdgeForConditionalGeneration"], "num_hidden_layers": 2}
    names = ("self_attn.to_q", "self_attn.to_k", "self_attn.to_v", "self_attn.to_out")
    layers = linear_layers(checkpoint(block("layers.0", *names), config))
    prefix = "layers.0.self_attn"
    assert set(map(frozenset, group_fused(layers, facts_of(config)))) == {
        frozenset({f"{prefix}.to_q", f"{prefix}.to_k", f"{prefix}.to_v"}),
        frozenset({f"{prefix}.to_out"}),
    }


def test_layers_of_unlike_width_do_not_read_the_same_input() -> None:
    tensors = {**block("model.layers.0", *MLP), "model.layers.0.mlp.up_proj.weight": (16, 9)}
    assert all(len(members) == 1 for members in group_fused(linear_layers(checkpoint(tensors))))


LEFT = {
    "the head": (EDGES, ["lm_head"]),
    "a tied head, which engines look for": ({"model.norm.weight": (8,)}, ["lm_head"]),
    "a head inside": (
        {"model.language_model.lm_head.weight": (32, 8)},
        ["model.language_model.lm_head"],
    ),
    "routers": (
        {"lm_head.weight": (9, 8), "model.layers.0.mlp.gate.weight": (2, 8)},
        ["lm_head", "model.layers.0.mlp.gate"],
    ),
    "fused experts": (
        {"lm_head.weight": (9, 8), "a.experts.gate_up_proj": (2, 8, 32)},
        ["lm_head", "a.experts"],
    ),
    "towers": (
        {"lm_head.weight": (9, 8), "visual.blocks.0.qkv.weight": (8, 8)},
        ["lm_head", "visual.blocks.0.qkv"],
    ),
    "no norms, embeddings, biases or convolutions": (
        {
            "lm_head.weight": (9, 8),
            "embed_tokens.weight": (9, 8),
            "visual.pos_embed.weight": (9, 8),
            "norm.weight": (8,),
            "a.conv1d.weight": (8, 1, 4),
            "a.bias": (8,),
        },
        ["lm_head"],
    ),
}


@pytest.mark.parametrize("what", LEFT)
def test_what_is_left_alone_is_listed_for_the_loaders(what: str) -> None:
    tensors, expected = LEFT[what]
    layers = block("model.layers.0", *MLP)
    modules = ignored_layers(
        checkpoint({**layers, **tensors}), [name.removesuffix(".weight") for name in layers]
    )
    assert modules == expected


def test_blocks_that_draft_are_listed_as_vllm_counts_them_on_from_the_decoder() -> None:
    layers = block("model.layers.0", *MLP) | block("model.layers.1", *MLP)
    drafts = block("model.mtp_layers.0", *MLP) | {"model.mtp_layers.0.norm.weight": (8,)}
    modules = ignored_layers(
        checkpoint({**layers, **drafts}),
        [name.removesuffix(".weight") for name in layers],
    )
    listed = NamePatterns.parse(modules)
    assert listed.match("model.mtp_layers.0.mlp.up_proj")
    assert listed.match("model.layers.2.mlp.up_proj")
    assert not listed.match("model.layers.1.mlp.up_proj")


def test_a_layer_that_no_rule_matched_is_listed_too() -> None:
    layers = block("model.layers.0", *MLP)
    assert ignored_layers(checkpoint(layers), ["model.layers.0.mlp.down_proj"]) == [
        "model.layers.0.mlp.gate_proj",
        "model.layers.0.mlp.up_proj",
        "lm_head",
    ]


@pytest.mark.parametrize(
    ("tensors", "dtype", "words"),
    [
        (EDGES, "BF16", "no linear layers in numbered decoder blocks"),
        (
            block("model.layers.0", *MLP),
            "I8",
            r"model\.layers\.0\.mlp\.gate_proj\.weight is I8: already quantized",
        ),
        (
            {"h.0.attn.c_attn.weight": (8, 24), "h.0.attn.c_attn.bias": (24,)},
            "F32",
            r"h\.0\.attn\.c_attn is stored transposed \(in, out\), as GPT-2 does",
        ),
    ],
    ids=["no blocks", "quantized", "transposed"],
)
def test_what_cannot_be_compressed_is_refused(tensors: Shapes, dtype: str, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        linear_layers(checkpoint(tensors, dtype=dtype))
