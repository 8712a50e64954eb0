"""Outputs that an earlier release wrote and verified, and that loaders answer NaN from or do not
load: each is refused. `fixtures/broken_outputs.json` holds their configs and headers.
"""

from __future__ import annotations

import ast
import copy
import json
from pathlib import Path

import pytest

from bitpress.checkpoint.safetensors import Entry
from bitpress.planning.engine_rules import find_faults

OUTPUTS = json.loads(
    (Path(__file__).parents[2] / "fixtures/broken_outputs.json").read_text(encoding="utf-8")
)

# Of each output a layer that is wrong, and words of what is said about it.
WRONG = {
    "whisper": {
        "proj_out": "tied to model.decoder.embed_tokens and not stored, and transformers",
        "model.encoder.layers.0.fc1": "looks for it as .encoder.layers.0.layers.mlp.fc1",
        "model.encoder.layers.0.self_attn.k_proj": "takes it for quantized",
    },
    "gemma3n": {
        "model.altup_projections.0": "looks for it as model.self_decoder.altup_projections.0",
        "model.per_layer_model_projection": "takes it for quantized",
        "model.layers.0.altup.modality_router": "its class computes in the dtype of this weight",
        "model.layers.0.altup.prediction_coefs": "less than the smallest number in 8 bits",
    },
    "granite4": {
        "model.layers.0.mamba.in_proj": "looks for it as model.layers.0.mixer.in_proj",
        "model.layers.0.mamba.out_proj": "takes it for quantized",
    },
    "deepseek_v32": {
        "model.layers.0.self_attn.indexer.wk": "never quantizes it",
        "model.layers.0.self_attn.indexer.weights_proj": "never quantizes it",
    },
    "jamba": {
        "model.layers.0.mamba.dt_proj": "never quantizes it",
        "model.layers.0.mamba.x_proj": "never quantizes it",
    },
    "t5": {
        "decoder.block.0.layer.0.SelfAttention.relative_attention_bias": "takes it for plain",
    },
    "bloom": {
        "transformer.h.0.self_attention.query_key_value": "moves the rows of every tensor",
    },
}


def faults_of(name: str, targets: list[str] | None = None) -> dict[str, str]:
    """The faults of an output by their subjects.

    Args:
        targets: what its config names instead of all linear layers.
    """
    entries = {}
    for tensor, text in OUTPUTS[name]["tensors"].items():
        dtype, _, shape = text.partition(" ")
        entries[tensor] = Entry(tensor, dtype, tuple(ast.literal_eval(shape)), Path("f"), 0)
    config = copy.deepcopy(OUTPUTS[name]["config"])
    if targets is not None:
        config["quantization_config"]["config_groups"]["group_0"]["targets"] = targets
    return {fault.subject: str(fault) for fault in find_faults(config, entries)}


@pytest.mark.parametrize("name", OUTPUTS)
def test_the_layer_that_a_loader_reads_otherwise_is_named(name: str) -> None:
    faults = faults_of(name)
    for layer, words in WRONG[name].items():
        assert words in faults.get(layer, ""), (layer, faults)


def test_a_target_that_an_engine_calls_otherwise_is_plain_to_it() -> None:
    tensors = OUTPUTS["whisper"]["tensors"]
    targets = [name.removesuffix(".weight_scale") for name in tensors if "weight_scale" in name]
    faults = faults_of("whisper", targets)
    words = "looks for it as .decoder.layers.0.layers.mlp.fc1, takes it for plain"
    assert words in faults["model.decoder.layers.0.fc1"]
