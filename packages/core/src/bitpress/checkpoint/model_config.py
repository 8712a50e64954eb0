"""`config.json`, read in one place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

KEY = "quantization_config"

METHOD = "compressed-tensors"


def text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of the text part of a model that has several; empty where it has not."""
    text = config.get("text_config")
    return text if isinstance(text, dict) else {}


def table(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a config says of how the model is quantized; empty where it says nothing."""
    found = config.get(KEY) or text_part(config).get(KEY)
    return found if isinstance(found, dict) else {}


def quantized_already(config: Mapping[str, Any]) -> str | None:
    """The method by which a model's config says that it is quantized, or None."""
    if not (config.get(KEY) or text_part(config).get(KEY)):
        return None
    return str(table(config).get("quant_method") or "an unnamed method")


def head_size(config: Mapping[str, Any]) -> int | None:
    """Channels of an attention head, as far as the config says."""
    for table in (config, config.get("text_config")):
        if isinstance(table, dict):
            heads, size, hidden = (
                table.get(key) for key in ("num_attention_heads", "head_dim", "hidden_size")
            )
            if isinstance(size, int) and size > 0:
                return size
            if isinstance(heads, int) and isinstance(hidden, int) and heads > 0:
                return hidden // heads or None
    return None


def hidden_size(config: Mapping[str, Any]) -> int | None:
    """Channels of the hidden states, as far as the config says."""
    return _count(config, "hidden_size", "n_embd", "d_model")


def experts_of_a_token(config: Mapping[str, Any]) -> int | None:
    """How many experts of a block compute a token, as far as the config says."""
    return _count(config, "num_experts_per_tok")


def _count(config: Mapping[str, Any], *keys: str) -> int | None:
    """The first of these that is a positive number, the text's own config before the whole
    model's.
    """
    tables = (table for table in (config.get("text_config"), config) if isinstance(table, dict))
    found = (table.get(key) for table in tables for key in keys)
    return next((count for count in found if isinstance(count, int) and count > 0), None)


def block_count(config: Mapping[str, Any]) -> int | None:
    """How many decoder blocks the config says that there are."""
    for table in (
        config,
        *(config.get(key) for key in ("text_config", "llm_config", "language_config")),
    ):
        for key in ("num_hidden_layers", "n_layer", "num_layers"):
            if isinstance(table, dict) and isinstance(table.get(key), int):
                return int(table[key])
    return None


def _number(config: Mapping[str, Any], key: str) -> int | None:
    """A count from the config, or from the text part of a multimodal one; None where neither has
    it.
    """
    for part in (config, config.get("text_config")):
        if isinstance(part, Mapping) and isinstance(part.get(key), int) and part[key] > 0:
            return int(part[key])
    return None
