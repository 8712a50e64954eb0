"""What engines answered is looked up by a layer's name, and a config is read as they read it."""

from __future__ import annotations

import attrs
import pytest
from hypothesis import given, strategies as st

from bitpress.checkpoint import engine_facts, layer_names
from bitpress.checkpoint.engine_facts import EngineFacts, EngineLayer, QuantizedLayers
from bitpress.checkpoint.safetensors import TensorSpec

FACTS = EngineFacts(
    engine="engine 1.0",
    layers={
        "model.embed_tokens": "embedding",
        "model.layers.*.mlp.down_proj": "linear",
        "model.layers.*.mlp.gate_proj": {"linear": "model.layers.*.mlp.gate_up_proj"},
        "model.layers.*.mlp.up_proj": {"linear": "model.layers.*.mlp.gate_up_proj"},
        "model.layers.*.mamba.in_proj": {
            "linear": "model.layers.*.mixer.in_proj",
            "listed_as": "model.layers.*.mixer.in_proj",
        },
        "model.layers.*.mamba.x_proj": "never",
        "model.layers.*.mlp.experts.*.w1": {"experts": "model.layers.*.mlp.experts"},
    },
    packed={"gate_up_proj": ["gate_proj", "up_proj"]},
    expert_leaves=("w1", "w3", "w2"),
    tied={"lm_head": "model.embed_tokens"},
    unnamed=(),
    limits={"model.layers.*.mlp.down_proj": {"never": "it is small"}},
)


def layer(name: str) -> EngineLayer:
    found = FACTS.layer(name)
    assert found is not None
    return found


@given(st.lists(st.integers(0, 999), min_size=1, max_size=4))
def test_a_starred_name_filled_with_its_numbers_is_the_name(numbers: list[int]) -> None:
    name = "model" + "".join(f".layers.{number}" for number in numbers)
    assert "*" in layer_names.star(name)
    assert layer_names.fill(layer_names.star(name), layer_names.numbers(name)) == name


NAMES = {
    "model.layers.3.mlp.down_proj": ("linear", "model.layers.3.mlp.down_proj"),
    "model.layers.11.mlp.up_proj": ("linear", "model.layers.11.mlp.gate_up_proj"),
    "model.layers.7.mamba.in_proj": ("linear", "model.layers.7.mixer.in_proj"),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_is_asked_for_by_the_engine_s_name_with_the_file_s_numbers(name: str) -> None:
    kind, asked_as = NAMES[name]
    assert (layer(name).kind, layer(name).asked_as) == (kind, (asked_as,))


def test_all_experts_are_asked_for_by_the_layers_of_the_first() -> None:
    assert layer("model.layers.2.mlp.experts.5.w1").asked_as == tuple(
        f"model.layers.2.mlp.experts.0.{leaf}" for leaf in ("w1", "w3", "w2")
    )


def test_a_layer_that_nobody_asked_about_has_no_facts() -> None:
    assert FACTS.layer("model.layers.0.mlp.other_proj") is None
    assert FACTS.why_not_quantized("model.layers.0.mlp.other_proj") is None


WHY = {
    "model.layers.0.mamba.x_proj": "engine 1.0 never quantizes it",
    "model.embed_tokens": "engine 1.0 looks for it under no name, and reads it as it is",
    "model.layers.0.mlp.down_proj": "engine 1.0: it is small",
    "model.layers.0.mlp.up_proj": None,
}


@pytest.mark.parametrize("name", WHY)
def test_why_a_layer_stays_as_it_is(name: str) -> None:
    assert FACTS.why_not_quantized(name) == WHY[name]


# A layer, what is ignored, and whether the engine leaves it alone then.
IGNORED = {
    "by its name": ("model.layers.0.mlp.down_proj", ["model.layers.0.mlp.down_proj"], True),
    "another block's": ("model.layers.0.mlp.down_proj", ["model.layers.1.mlp.down_proj"], False),
    "by an expression": ("model.layers.0.mlp.down_proj", ["re:.*down_proj$"], True),
    "an expression matches from the start": ("model.layers.0.mlp.down_proj", ["re:mlp"], False),
    "all parts of a fused layer": (
        "model.layers.0.mlp.up_proj",
        ["model.layers.0.mlp.up_proj", "model.layers.0.mlp.gate_proj"],
        True,
    ),
    "one part of a fused layer": (
        "model.layers.0.mlp.up_proj",
        ["model.layers.0.mlp.up_proj"],
        False,
    ),
    "the fused layer itself": (
        "model.layers.0.mlp.up_proj",
        ["model.layers.0.mlp.gate_up_proj"],
        True,
    ),
    "a name that the engine renames": (
        "model.layers.0.mamba.in_proj",
        ["model.layers.0.mamba.in_proj"],
        True,
    ),
    "an expression is not renamed": (
        "model.layers.0.mamba.in_proj",
        [r"re:model\.layers\.0\.mamba\.in_proj"],
        False,
    ),
}


@pytest.mark.parametrize("case", IGNORED)
def test_a_layer_is_ignored_under_the_names_that_the_engine_compares(case: str) -> None:
    name, ignored, is_ignored = IGNORED[case]
    table = {"ignore": ignored, "config_groups": {"group_0": {"targets": ["Linear"]}}}
    groups = QuantizedLayers.read(FACTS, table).groups_of(layer(name))
    assert groups == ([None] if is_ignored else ["group_0"])


def test_a_layer_belongs_to_the_first_group_that_names_it() -> None:
    table = {
        "config_groups": {
            "group_0": {"targets": ["model.layers.0.mlp.down_proj"]},
            "group_1": {"targets": ["re:.*"]},
        }
    }
    reading = QuantizedLayers.read(FACTS, table)
    assert reading.groups_of(layer("model.layers.0.mlp.down_proj")) == ["group_0"]
    assert reading.groups_of(layer("model.layers.1.mlp.down_proj")) == ["group_1"]


def test_a_config_without_architectures_is_known_by_a_type_that_one_class_has() -> None:
    by_name = engine_facts.facts_of({"architectures": ["Qwen2ForCausalLM"]})
    by_type = engine_facts.facts_of({"model_type": "qwen2"})
    assert [attrs.asdict(facts) for facts in by_name] == [attrs.asdict(f) for f in by_type]
    assert len(by_name) >= 2
    assert engine_facts.engines_without({"architectures": ["Qwen2ForCausalLM"]}) == []


def test_an_architecture_that_nobody_knows_has_no_facts() -> None:
    config = {"architectures": ["NobodyForCausalLM"], "model_type": "llama"}
    assert engine_facts.facts_of(config) == ()
    assert len(engine_facts.engines_without(config)) >= 2
    assert engine_facts.architecture_of(config) == "NobodyForCausalLM"


# A limit, a stored tensor and its shape, and whether the engine can read it of a layer of 8 rows.
READABLE = {
    "a scale for each row": ("rows_only", "weight_scale", (8, 1), True),
    "one scale for all": ("rows_only", "weight_scale", (1,), False),
    "a tensor that the loader does not know": (
        "input_global_scale",
        "input_global_scale",
        (1,),
        False,
    ),
    "another tensor": ("input_global_scale", "weight_global_scale", (1,), True),
}


@pytest.mark.parametrize("case", READABLE)
def test_a_limit_is_about_some_of_the_stored_tensors(case: str) -> None:
    limit, suffix, shape, is_readable = READABLE[case]
    facts = attrs.evolve(FACTS, limits={"model.layers.*.mlp.up_proj": {limit: "so it is"}})
    spec = TensorSpec("F32", shape)
    reason = facts.why_unreadable("model.layers.4.mlp.up_proj", suffix, spec, 8)
    assert reason == (None if is_readable else "engine 1.0: so it is")
    assert facts.why_unreadable("model.layers.4.mlp.down_proj", suffix, spec, 8) is None


def test_layers_of_towers_that_files_do_not_name_are_told_by_those_of_the_first_blocks() -> None:
    unnamed = ("vision_tower.layers.*.q_proj", "projector", "model.layers.*.mlp.gate_proj")
    facts = attrs.evolve(FACTS, unnamed=unnamed)
    assert facts.unnamed_examples == ["vision_tower.layers.0.q_proj", "projector"]
