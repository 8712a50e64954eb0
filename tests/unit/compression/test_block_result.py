"""What was measured of a block is kept beside its shard, for a run that resumes."""

from __future__ import annotations

import json

from bitpress.compression.calibration.block_result import BlockResult

RESULT = BlockResult(
    {"model.layers.0.mlp.up_proj": 0.25},
    {"model.layers.0.input_layernorm.weight": {"rows": [1, -2.125]}},
    ["model.layers.0.mlp.up_proj: all its weights are zero"],
    {"model.layers.0.mlp.experts.0.up_proj": 3},
    {"model.layers.0.mlp.up_proj": 0.2},
    {"model.layers.0": 0.5},
)


def test_a_result_comes_back_from_its_json() -> None:
    assert BlockResult.from_json(json.loads(json.dumps(RESULT.as_json()))) == RESULT


def test_its_keys_are_those_that_an_interrupted_run_has_written() -> None:
    assert list(RESULT.as_json()) == [
        "errors",
        "rescaled",
        "warnings",
        "rounding_errors",
        "blocks",
        "tokens",
    ]
