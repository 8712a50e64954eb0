"""Models are built as their configs describe them, and no config brings code along."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
from fixtures.learner_scheme import runnable_model
from huggingface_hub import constants
from transformers.modeling_utils import PreTrainedModel

from bitpress import CheckpointError
from bitpress.checkpoint.reader import Checkpoint, open_checkpoint
from bitpress.modeling.build import build_model

KERNEL = "stranger/kernel"
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 96,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
# Keys of a config that name a kernel, as transformers 4 and 5 read them.
KEYS: dict[str, dict[str, Any]] = {
    "attention": {"attn_implementation": KERNEL},
    "attention of transformers 4": {"_attn_implementation": KERNEL},
    "attention as it is stored": {"_attn_implementation_internal": KERNEL},
    "attention by part": {"attn_implementation": {"": KERNEL, "text_config": KERNEL}},
    "flash attention": {"attn_implementation": "flash_attention_2"},
    "experts": {"experts_implementation": "sonicmoe"},
    "experts as they are stored": {"_experts_implementation": "deepgemm"},
}


def implementations(checkpoint: Checkpoint) -> set[str]:
    """How the model's parts compute their attention and experts."""
    model = build_model(checkpoint, False)
    configs = [part.config for part in model.modules() if isinstance(part, PreTrainedModel)]
    names = ("_attn_implementation", "_experts_implementation")
    return {str(getattr(config, name, None)) for config in configs for name in names}


@pytest.mark.parametrize("what", KEYS)
def test_a_kernel_that_a_config_names_is_not_fetched(tmp_path: Path, what: str) -> None:
    model = runnable_model(tmp_path / "model")
    expected = implementations(open_checkpoint(model))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | KEYS[what]))
    assert implementations(open_checkpoint(model)) == expected


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
@pytest.mark.parametrize("what", KEYS)
def test_a_kernel_that_a_part_of_a_config_names_is_not_fetched(
    tmp_path: Path, what: str, part: str
) -> None:
    checkpoint = open_checkpoint(runnable_model(tmp_path / "model"))
    config: dict[str, Any] = {
        "model_type": "gemma3",
        "architectures": ["Gemma3ForConditionalGeneration"],
        "text_config": {"model_type": "gemma3_text", **TEXT},
        "vision_config": {"model_type": "siglip_vision_model", **VISION},
        "mm_tokens_per_image": 4,
    }
    config[part] = config[part] | KEYS[what]
    (checkpoint.folder / "config.json").write_text(json.dumps(config))
    assert implementations(checkpoint) <= {"sdpa", "eager", "grouped_mm", "None"}


@pytest.mark.parametrize("model_type", ["detr", "mask2former"])
def test_a_model_that_a_config_names_is_not_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    requests: list[str] = []

    def resolve(host: str, *args: Any, **kwargs: Any) -> None:
        requests.append(host)
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    checkpoint = open_checkpoint(runnable_model(tmp_path / "model"))
    classes = {"detr": "DetrForObjectDetection", "mask2former": "Mask2FormerModel"}
    config = {
        "model_type": model_type,
        "architectures": [classes[model_type]],
        "backbone": "stranger/model",
        "use_pretrained_backbone": True,
        "use_timm_backbone": False,
        "backbone_config": None,
    }
    (checkpoint.folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="transformers cannot build the model"):
        build_model(checkpoint, False)
    assert requests == []
    assert constants.HF_HUB_OFFLINE is False
