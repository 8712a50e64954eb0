"""The law of loaders: transformers loads what a run writes, and computes with the weights that
`dequantize` returns.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor

from bitpress import api
from bitpress.checkpoint.reader import open_checkpoint
from bitpress.conformance import trial
from bitpress.conformance.models import LLAMA, tensors_of, write_model
from bitpress.errors import BitpressError
from bitpress.modeling import transformers_loader
from bitpress.output.open_model import open_written
from bitpress.output.written_model import WrittenModel
from bitpress.planning.loaders import decodes_to_bfloat16, describe_loaders
from bitpress.schemes import pipeline
from bitpress.schemes.registry import Step

# One block holds every kind of layer, and a run of it takes less than a second.
CONFIG = {**LLAMA, "num_hidden_layers": 1}

INPUT_IDS = torch.arange(48).reshape(2, 24) * 2 % CONFIG["vocab_size"]  # (sequences, length)

# A word for each token, and texts of them.
WORDS = [f"w{number}" for number in range(CONFIG["vocab_size"])]
CALIBRATION = [" ".join(WORDS[i * 7 % 64 : i * 7 % 64 + 32]) for i in range(4)]

# Of logits, relative, by the dtype that they are computed in. A scale that is left out, or codes in
# another order, make an error of about 1.
MAX_DIFFERENCE = {torch.float32: 1e-3, torch.bfloat16: 0.03}


def test_transformers_loads_it_and_computes_with_the_dequantized_weights(
    step: Step, tmp_path: Path
) -> None:
    trial.require_hook(step, "dequantize")
    if step.options.transformers_reason is not None:
        pytest.skip(f"`Options.transformers_reason`: {step.options.transformers_reason}")
    out = tmp_path / "out"
    data: dict[str, Any] = {}
    if step.calibrated:
        data = {"calibration": CALIBRATION, "samples": 4, "sequence_length": 32}
    options = attrs.asdict(step.options)
    recipe = {"layers": [{"match": "*", "steps": [{"use": step.scheme.name, **options}]}]}
    model = write_model(tmp_path / "model", config=CONFIG)
    _write_tokenizer(model)
    try:
        plan = api.plan(model, recipe=recipe)
    except BitpressError as e:
        pytest.skip(f"no plan with these options for a Llama of 128 columns ({e})")
    api.compress(model, out, recipe=recipe, threads=1, **data)

    written = open_written(open_checkpoint(out))
    config = written.checkpoint.config
    if "quantization_config" in config and not transformers_loader.has_decoder():
        pytest.skip("transformers needs a library for it: pip install compressed-tensors")
    must_dequantize = describe_loaders(plan).needs_dequantizing
    dtype = torch.bfloat16 if must_dequantize else _choose_dtype(config)
    plain_config = {key: config[key] for key in config if key != "quantization_config"}
    expected = transformers_loader.compute_plain_logits(
        plain_config, _read_weights(written), INPUT_IDS, dtype
    )
    try:
        logits = transformers_loader.compute_logits(
            out, INPUT_IDS, dtype, must_dequantize=must_dequantize
        )
    except Exception as e:
        pytest.fail(
            f"transformers does not load what is stored ({type(e).__name__}: {e}): change "
            "`serialize`, or let `Options.transformers_reason` say why it cannot"
        )
    difference = float((logits.float() - expected.float()).norm() / expected.float().norm())
    assert difference <= MAX_DIFFERENCE[dtype], (
        f"transformers computes with other weights: logits differ by {difference:.0%}. The config "
        "that `serialize` returns must describe its tensors, or `Options.transformers_reason` say "
        "why transformers does not read them"
    )


def _write_tokenizer(model: Path) -> None:
    """Write a tokenizer that splits texts at spaces."""
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "post_processor": None,
        "decoder": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {
            "type": "WordLevel",
            "vocab": {word: number for number, word in enumerate(WORDS)},
            "unk_token": WORDS[0],
        },
    }
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))


def _read_weights(written: WrittenModel) -> dict[str, Tensor]:
    """The weights of an output by name: of compressed layers what `dequantize` returns."""
    weights = tensors_of(written.checkpoint.folder)
    for module, layer in written.layers.items():
        tensors = {suffix: weights.pop(f"{module}.{suffix}") for suffix in written.entries(module)}
        config = written.expected_layer(module, layer.shape[0]).config
        weights[f"{module}.weight"] = pipeline.dequantize(tensors, config, written.steps(module))
    return weights


def _choose_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """Float32, which shows small differences; bfloat16 where the decoder gives nothing else."""
    groups = config.get("quantization_config", {}).get("config_groups", {}).values()
    is_bfloat16 = any(decodes_to_bfloat16(group["weights"]) for group in groups)
    return torch.bfloat16 if is_bfloat16 else torch.float32
