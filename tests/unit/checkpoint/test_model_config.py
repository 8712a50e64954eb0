"""One reading of `config.json`, for models with one part and with several."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

import bitpress
from bitpress.checkpoint.model_config import (
    ModelConfig,
    without_quantization,
)
from bitpress.conformance.models import LLAMA, llama_tensors, write_model
from bitpress.planning import tensor_parallel

SIZES: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "head_dim": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 4096,
    "num_local_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
}

READ = ModelConfig("llama", 64, 16, 4, 8, 2, 1000, 4096, 6, 3, 24)

# every size of the text part, other than it is
OTHER = {key: "other" if key == "model_type" else value + 1 for key, value in SIZES.items()}


def test_a_config_of_one_part_is_read_from_the_top_level() -> None:
    assert ModelConfig.from_json(SIZES) == READ


def test_a_config_that_says_nothing_gives_nothing() -> None:
    assert ModelConfig.from_json({}) == ModelConfig()


@pytest.mark.parametrize("part", ["text_config", "llm_config", "language_config"])
def test_all_sizes_are_those_of_the_text_part_where_both_levels_have_them(part: str) -> None:
    assert ModelConfig.from_json(OTHER | {part: SIZES}) == READ


@pytest.mark.parametrize("key", SIZES)
def test_the_top_level_fills_in_what_the_text_part_lacks(key: str) -> None:
    rest = {name: value for name, value in SIZES.items() if name != key}
    assert ModelConfig.from_json({key: SIZES[key], "text_config": rest}) == READ
    assert ModelConfig.from_json({key: SIZES[key], "text_config": rest | {key: None}}) == READ


def test_a_head_is_what_the_heads_share_of_the_hidden_states_where_no_size_is_named() -> None:
    assert ModelConfig.from_json({"hidden_size": 64, "num_attention_heads": 8}).head_dim == 8
    text = {"hidden_size": 32, "num_attention_heads": 2}
    both = {"hidden_size": 64, "num_attention_heads": 8, "text_config": text}
    assert ModelConfig.from_json(both).head_dim == 16


def test_older_names_of_sizes_are_known() -> None:
    config = ModelConfig.from_json({"n_embd": 64, "n_layer": 4, "intermediate_size": 24})
    assert config == ModelConfig(hidden_size=64, num_layers=4, expert_size=24)


def test_values_that_are_no_positive_numbers_count_as_not_there() -> None:
    for value in ("64", 0, -1, 1.5, None, [64], True):
        assert ModelConfig.from_json({"hidden_size": value}).hidden_size is None
    assert ModelConfig.from_json({"text_config": "no table", "hidden_size": 64}).hidden_size == 64


def test_a_config_may_say_that_there_are_no_blocks() -> None:
    assert ModelConfig.from_json({"num_hidden_layers": 0}).num_layers == 0


def test_how_a_model_is_quantized_is_said_at_the_top_or_in_its_text_part() -> None:
    fp8, int4 = ({"quantization_config": {"quant_method": name}} for name in ("fp8", "int4"))
    assert ModelConfig.from_json(SIZES).quantization_method is None
    assert ModelConfig.from_json(fp8).quantization_method == "fp8"
    assert ModelConfig.from_json({"text_config": int4}).quantization_method == "int4"
    # transformers and vLLM read the top level
    assert ModelConfig.from_json(fp8 | {"text_config": int4}).quantization_method == "fp8"


@pytest.mark.parametrize(
    ("value", "method"),
    [("int8", "an unnamed method"), ({"bits": 4}, "an unnamed method"), ({}, None), (None, None)],
)
def test_a_quantization_config_without_a_method_counts(value: Any, method: str | None) -> None:
    config = ModelConfig.from_json({"quantization_config": value})
    assert config.quantization_method == method


def test_a_config_without_its_quantization_is_the_same_otherwise() -> None:
    quantized = {"quantization_config": {"quant_method": "fp8"}}
    config = {**SIZES, **quantized, "text_config": {**SIZES, **quantized}}
    assert without_quantization(config) == {**SIZES, "text_config": SIZES}
    assert "quantization_config" in config


def test_a_plan_parses_the_config_as_often_however_many_layers_there_are(
    tmp_path: Path, with_toy: Path
) -> None:
    counts = []
    for num_layers in (2, 4):
        config = LLAMA | {"num_hidden_layers": num_layers}
        model = write_model(tmp_path / str(num_layers), llama_tensors(config=config), config)
        with patch.object(ModelConfig, "from_json", wraps=ModelConfig.from_json) as from_json:
            tensor_parallel.remarks(bitpress.plan(model, scheme="toy"), 2)
        counts.append(from_json.call_count)
    assert counts[0] == counts[1]
