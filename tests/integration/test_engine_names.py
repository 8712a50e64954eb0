"""Whatever is planned for an architecture of the engines' facts, the engines read as it is stored.

Checkpoints are headers alone, with the layers that the facts name.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from compressed_tensors.utils.match import is_match
from hypothesis import given, strategies as st
from torch import nn

from bitpress.checkpoint import engine_facts, layer_names
from bitpress.checkpoint.engine_facts import EngineFacts, QuantizedLayers
from bitpress.checkpoint.fused_experts import PAIRS
from bitpress.checkpoint.layer_names import find_fused
from bitpress.checkpoint.reader import Checkpoint
from bitpress.checkpoint.safetensors import Entry
from bitpress.errors import BitpressError
from bitpress.planning.engine_rules import find_faults
from bitpress.planning.linear_layers import linear_layers
from bitpress.planning.planner import make_plan
from bitpress.planning.recipe import from_json
from bitpress.schemes.registry import discover

WIDTH = 256
# What an "other" tensor may be: the kernel of a convolution.
KERNEL = (WIDTH, 1, 4)


def one_group(layers: list[str]) -> list[dict[str, Any]]:
    return [{"match": "*", "steps": ["fp8"]}]


def two_groups(layers: list[str]) -> list[dict[str, Any]]:
    first = find_fused(layers)[0]
    patterns = [f"*.{name.rpartition('.')[2]}" for name in first]
    return [{"match": patterns, "steps": ["fp8"]}, {"match": "*", "steps": ["int8"]}]


def one_block_alone(layers: list[str]) -> list[dict[str, Any]]:
    block = f"{layer_names.container(layers[0])}.0.*"
    return [{"match": block, "steps": []}, *one_group(layers)]


def architectures() -> list[str]:
    """Every architecture of which an engine's facts are known."""
    documents = engine_facts._documents()
    return sorted({name for document in documents for name in document["architectures"]})


def checkpoint(architecture: str) -> Checkpoint:
    """Headers of a model of two blocks, each with two experts, with all layers of the facts."""
    config = {"architectures": [architecture], "hidden_size": WIDTH, "num_hidden_layers": 2}
    entries = {}
    for name, shape in _tensors(engine_facts.facts_of(config)):
        entries[name] = Entry(name, "BF16", shape, Path("model.safetensors"), 0)
    return Checkpoint(Path("model"), config, {}, entries, ())


def _tensors(engines: tuple[EngineFacts, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    seen: set[tuple[str, ...]] = set()
    patterns = {pattern for facts in engines for pattern in facts.layers}
    for pattern in sorted(patterns):
        # Files hold the experts in one tensor, or each by itself.
        parent, _, leaf = pattern.rpartition(".")
        by_expert = (f"{parent}.*.", f"{parent}.experts.*.")
        if leaf in itertools.chain(*PAIRS) and any(p.startswith(by_expert) for p in patterns):
            continue
        # Some models are known with two names for a layer, of which files have one.
        in_memory = [layer.asked_as for facts in engines[:1] if (layer := facts.layer(pattern))]
        if in_memory and in_memory[0] in seen:
            continue
        seen.update(in_memory)
        for numbers in itertools.product("01", repeat=pattern.count("*")):
            name = layer_names.fill(pattern, numbers)
            kinds = {layer.kind for facts in engines if (layer := facts.layer(name))}
            yield f"{name}.weight", KERNEL if kinds == {"other"} else (WIDTH, WIDTH)


# Rules, every how many architectures are tried, and of how many a plan can be made: of some only
# one layer is compressed, or engines make one of all.
CASES = {
    "one group": (one_group, 1, 0.93),
    "two groups": (two_groups, 4, 0.7),
    "one block alone": (one_block_alone, 4, 0.9),
}


@pytest.mark.parametrize("case", CASES)
def test_engines_find_every_layer_as_it_is_planned(case: str) -> None:
    rules, step, least = CASES[case]
    registry = discover()
    faults: dict[str, list[str]] = {}
    tried = architectures()[::step]
    num_plans = 0
    for architecture in tried:
        source = checkpoint(architecture)
        try:
            table = {"layers": rules(list(linear_layers(source)))}
            plan = make_plan(source, from_json(table, registry, "recipe"))
        except BitpressError:
            continue
        num_plans += 1
        entries = {e.name: e for shard in plan.shards for e in shard.header.entries}
        found = [str(fault) for fault in find_faults(plan.config, entries)]
        faults |= {architecture: found[:3]} if found else {}
    assert faults == {}
    assert num_plans >= least * len(tried)


ASKED_AS = ("model.layers.0.attn.q_proj", "model.layers.1.attn.q_proj", "model.layers.0.mlp.up")
LISTED = (*ASKED_AS, "re:.*attn.*", r"re:model\.layers\.\d+\.mlp", "re:attn", "Linear", "lm_head")


@given(
    st.lists(st.sampled_from(LISTED[:-2]), unique=True),
    st.lists(st.sampled_from(LISTED), unique=True),
    st.sampled_from(ASKED_AS),
)
def test_a_layer_is_quantized_where_compressed_tensors_matches_it(
    ignored: list[str], targets: list[str], name: str
) -> None:
    facts = EngineFacts("engine", {}, {}, (), {}, (), {})
    table = {"ignore": ignored, "config_groups": {"group_0": {"targets": targets}}}
    is_quantized = QuantizedLayers.read(facts, table).group(name) is not None
    assert is_quantized == is_match(name, nn.Linear(1, 1), targets, ignored)
