"""Small models of many architectures can be made, are small, and compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.small_model_tables import ARCHITECTURES, NOT_FROM_TEXT
from fixtures.small_models import build_small_model

# In total about three seconds.
QUICK = (
    "DeepseekV32ForCausalLM",
    "Gemma4ForConditionalGeneration",
    "GraniteMoeHybridForCausalLM",
    "NemotronHForCausalLM",
    "Qwen2VLForConditionalGeneration",
    "T5ForConditionalGeneration",
)
MEGABYTES = 1e6
TOKENS = torch.arange(96).reshape(4, 24) * 7 % 95 + 1  # (sequences, length)


def computes(architecture: str, folder: Path) -> None:
    """Build a model, load it again, and compute with it, from text where that is possible."""
    import transformers

    model_class: Any = getattr(transformers, architecture)
    build_small_model(architecture, folder)
    assert sum(file.stat().st_size for file in folder.glob("*.safetensors")) < 30 * MEGABYTES
    model, loading = model_class.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not loading["missing_keys"]
    assert not loading["mismatched_keys"]
    if architecture in NOT_FROM_TEXT:
        return
    inputs = {"input_ids": TOKENS}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = TOKENS
    with torch.inference_mode():
        logits = model.eval()(**inputs, use_cache=False).logits
    assert torch.isfinite(logits).all()
    assert logits.std() > 0


@pytest.mark.parametrize("architecture", QUICK)
def test_a_small_model_computes(architecture: str, tmp_path: Path) -> None:
    computes(architecture, tmp_path / "model")


@pytest.mark.long
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_small_model_computes(architecture: str, tmp_path: Path) -> None:
    computes(architecture, tmp_path / "model")
