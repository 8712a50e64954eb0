"""Every rule of the engines, broken once; a checkpoint that keeps them all has no fault."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bitpress.checkpoint.reader import NAMES
from bitpress.checkpoint.safetensors import Entry
from bitpress.planning.engine_rules import explain_expert_layout, find_faults

BLOCK = "model.layers.0"
Q, K, UP, DOWN = (
    f"{BLOCK}.{name}"
    for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj")
)
Tensors = dict[str, torch.Tensor]
Table = dict[str, Any]


def faults_of(table: Table, tensors: Tensors) -> list[str]:
    entries = {
        name: Entry(name, NAMES[t.dtype], tuple(t.shape), Path("f"), 0)
        for name, t in tensors.items()
    }
    config = {"num_hidden_layers": 2} | ({"quantization_config": table} if table else {})
    faults = find_faults(config, entries, lambda entry: tensors[entry.name])
    return [str(fault) for fault in faults]


def per_tensor() -> tuple[Table, Tensors]:
    """Attention with one scale for both and static inputs, down left alone."""
    tensors: Tensors = {
        f"{DOWN}.weight": torch.zeros(4, 8),
        "lm_head.weight": torch.zeros(9, 4),
        "model.embed_tokens.weight": torch.zeros(9, 4),
    }
    for module in (Q, K):
        tensors[f"{module}.weight"] = torch.zeros(8, 4, dtype=torch.int8)
        tensors[f"{module}.weight_scale"] = tensors[f"{module}.input_scale"] = torch.tensor([0.5])
    args = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False}
    group = {
        "targets": ["Linear"],
        "format": "int-quantized",
        "weights": args,
        "input_activations": dict(args),
    }
    table = {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": "int-quantized",
    }
    return {**table, "ignore": ["lm_head", DOWN], "config_groups": {"group_0": group}}, tensors


def packed() -> tuple[Table, Tensors]:
    """One layer in 4-bit words of groups of 32 with zero points."""
    table, _ = per_tensor()
    args = {
        "num_bits": 4,
        "type": "int",
        "symmetric": False,
        "strategy": "group",
        "group_size": 32,
        "dynamic": False,
    }
    table["config_groups"]["group_0"] = {
        "targets": [UP],
        "format": "pack-quantized",
        "weights": args,
        "input_activations": None,
    }
    tensors: Tensors = {
        f"{UP}.weight_packed": torch.zeros(8, 8, dtype=torch.int32),
        f"{UP}.weight_scale": torch.ones(8, 2),
        f"{UP}.weight_shape": torch.tensor([8, 64]),
        f"{UP}.weight_zero_point": torch.zeros(1, 2, dtype=torch.int32),
    }
    return {**table, "format": "pack-quantized", "ignore": ["lm_head"]}, tensors


def blocks() -> tuple[Table, Tensors]:
    """Attention in blocks of 4 x 4."""
    table, tensors = per_tensor()
    group = table["config_groups"]["group_0"]
    group["weights"] = {**group["weights"], "strategy": "block", "block_structure": [4, 4]}
    group["input_activations"] = None
    for module in (Q, K):
        del tensors[f"{module}.input_scale"]
        tensors[f"{module}.weight_scale"] = torch.ones(2, 1)
    return table, tensors


def group(change: Callable[[Table], Any]) -> Callable[[Table, Tensors], None]:
    return lambda table, tensors: change(table["config_groups"]["group_0"])


def stored(name: str, tensor: torch.Tensor | None) -> Callable[[Table, Tensors], None]:
    return lambda table, tensors: (
        tensors.pop(name) if tensor is None else tensors.update({name: tensor})
    )  # type: ignore[return-value]


def second_group(table: Table, tensors: Tensors) -> None:
    one = table["config_groups"]["group_0"]
    table["config_groups"] = {
        "group_0": {**one, "targets": [Q]},
        "group_1": {**copy.deepcopy(one), "targets": [K]},
    }


def ignored(pattern: str) -> Callable[[Table, Tensors], None]:
    return lambda table, tensors: table["ignore"].append(pattern)


def half_plain(table: Table, tensors: Tensors) -> None:
    del tensors[f"{K}.weight_scale"], tensors[f"{K}.input_scale"]
    table["ignore"].append(K)


def with_drafts(table: Table, tensors: Tensors) -> None:
    tensors["model.mtp_layers.0.mlp.down_proj.weight"] = torch.zeros(4, 8)
    table["ignore"].append("model.mtp_layers.0.mlp.down_proj")


def same_group_again(table: Table, tensors: Tensors) -> None:
    table["config_groups"]["group_1"] = table["config_groups"]["group_0"]


BROKEN = {  # (what is broken, how, words of the fault)
    "another method": (
        per_tensor,
        lambda t, _: t.update(quant_method="fp8"),
        "quant_method is 'fp8'",
    ),
    "no status": (per_tensor, lambda t, _: t.pop("quantization_status"), "random weights"),
    "no groups": (per_tensor, lambda t, _: t.update(config_groups={}), "no config_groups"),
    "no config": (per_tensor, lambda t, _: t.clear(), "it has no quantization_config"),
    "another format": (per_tensor, lambda t, _: t.update(format="dense"), "its format is 'dense'"),
    "a plain layer is not ignored": (
        per_tensor,
        lambda t, _: t["ignore"].remove(DOWN),
        f"{DOWN}: it is stored as it was",
    ),
    "a compressed layer is ignored": (per_tensor, ignored(K), f"{K}: it is compressed, and none"),
    "a layer is in two groups": (
        per_tensor,
        same_group_again,
        f"{Q}: it is compressed, and 2",
    ),
    "a block that drafts is ignored by its name in the files alone": (
        per_tensor,
        with_drafts,
        "vLLM looks for it as model.layers.2.mlp.down_proj",
    ),
    "a pattern ignores nothing": (
        per_tensor,
        ignored("re:.*gate$"),
        "ignores re:.*gate$, which is not there",
    ),
    "ignored layers that are no list": (
        per_tensor,
        lambda t, _: t.update(ignore="lm_head"),
        "its ignore is no list of names",
    ),
    "an ignored layer that is no name": (
        per_tensor,
        lambda t, _: t["ignore"].append(5),
        "its ignore holds 5, which is no name",
    ),
    "an expression that is none": (
        per_tensor,
        ignored("re:(lm_head"),
        "'re:(lm_head', which is no regular expression",
    ),
    "a target that takes forever to match": (
        per_tensor,
        group(lambda g: g["targets"].append("re:(m+)+x")),
        "its group_0.targets holds 're:(m+)+x', which may take forever to match",
    ),
    "a target is nothing": (
        packed,
        group(lambda g: g["targets"].append("model.x")),
        "group_0 targets model.x",
    ),
    "fused layers in two groups": (per_tensor, second_group, f"{Q}: engines fuse it with {K}"),
    "half of a fused layer is plain": (
        per_tensor,
        half_plain,
        "engines fuse it with",
    ),
    "fused layers with two scales": (
        per_tensor,
        stored(f"{K}.weight_scale", torch.tensor([0.25])),
        f"{K}: its weight_scale is not that of {Q}",
    ),
    "fused layers with two input scales": (
        per_tensor,
        stored(f"{K}.input_scale", torch.tensor([0.25])),
        f"{K}: its input_scale is not that of {Q}",
    ),
    "no static scale": (
        per_tensor,
        stored(f"{Q}.input_scale", None),
        f"{Q}: input_scale is missing",
    ),
    "a static scale beside dynamic inputs": (
        per_tensor,
        group(lambda g: g["input_activations"].update(strategy="token", dynamic=True)),
        f"{Q}: input_scale is there",
    ),
    "a zero point of symmetric inputs": (
        per_tensor,
        stored(f"{Q}.input_zero_point", torch.tensor([0], dtype=torch.int8)),
        f"{Q}: input_zero_point is there",
    ),
    "a zero point of symmetric weights": (
        packed,
        group(lambda g: g["weights"].update(symmetric=True)),
        "zero_point is there",
    ),
    "no zero point": (
        packed,
        stored(f"{UP}.weight_zero_point", None),
        f"{UP}: weight_zero_point is missing",
    ),
    "no shape": (packed, stored(f"{UP}.weight_shape", None), f"{UP}: weight_shape is missing"),
    "another shape": (
        packed,
        stored(f"{UP}.weight_shape", torch.tensor([8, 72])),
        f"{UP}: weight_shape says [8, 72]",
    ),
    "a ragged group": (
        packed,
        group(lambda g: g["weights"].update(group_size=48)),
        "64 columns are no multiple",
    ),
    "too few scales": (
        packed,
        stored(f"{UP}.weight_scale", torch.ones(8, 1)),
        f"{UP}: weight_scale is [8, 1]",
    ),
    "no codes": (packed, stored(f"{UP}.weight_packed", None), f"{UP}: there are no codes"),
    "too few block scales": (
        blocks,
        stored(f"{Q}.weight_scale", torch.ones(1, 1)),
        f"{Q}: weight_scale is [1, 1]",
    ),
    "a block across fused layers": (
        blocks,
        lambda _, x: x.update({f"{Q}.weight": torch.zeros(6, 4, dtype=torch.int8)}),
        f"{Q}: 6 rows are no multiple of 4",
    ),
}


@pytest.mark.parametrize("good", [per_tensor, packed, blocks])
def test_a_checkpoint_that_keeps_the_rules_has_no_fault(
    good: Callable[[], tuple[Table, Tensors]],
) -> None:
    assert faults_of(*good()) == []


def test_a_lone_tile_of_each_fused_layer_has_a_scale_of_its_own() -> None:
    table, tensors = blocks()
    for module, scale in ((Q, 0.5), (K, 0.25)):
        tensors[f"{module}.weight"] = torch.zeros(4, 4, dtype=torch.int8)
        tensors[f"{module}.weight_scale"] = torch.tensor([[scale]])
    assert faults_of(table, tensors) == []


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_rule_is_a_fault_that_names_the_place(what: str) -> None:
    good, change, words = BROKEN[what]
    table, tensors = good()
    change(table, tensors)
    messages = faults_of(table, tensors)
    assert any(words in fault for fault in messages), messages
    assert len(messages) <= 3


def layout(kind: str, strategy: str, inputs: str | None, dynamic: bool = True) -> dict[str, Any]:
    weights = {"type": kind, "num_bits": 8, "strategy": strategy}
    return {
        "weights": weights,
        "input_activations": inputs and {"strategy": inputs, "dynamic": dynamic},
    }


@pytest.mark.parametrize(
    ("group", "refused"),
    [
        (None, False),
        (layout("float", "channel", "token"), False),
        (layout("float", "tensor", "tensor", False), False),
        (layout("float", "block", "group"), False),
        (layout("float", "group", "group"), False),
        (layout("float", "tensor", "token"), True),
        (layout("float", "channel", "tensor", False), True),
        (layout("int", "channel", "token"), False),
        (layout("int", "channel", "tensor", False), True),
        (layout("int", "tensor", "token"), True),
        (layout("int", "group", None), False),
    ],
)
def test_layouts_that_kernels_for_experts_do_not_take_are_told(
    group: dict[str, Any] | None, refused: bool
) -> None:
    assert (explain_expert_layout(group) is not None) == refused
