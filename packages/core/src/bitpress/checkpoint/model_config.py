"""`config.json`, read in one place: the sizes of a model and how it is quantized."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import frozen

KEY = "quantization_config"

METHOD = "compressed-tensors"

# Where models with several parts describe the one that writes text: transformers' own classes, then
# InternVL, then DeepSeek-VL.
TEXT_PARTS = ("text_config", "llm_config", "language_config")


@frozen
class ModelConfig:
    """What a `config.json` says of the decoder; None where it says nothing.

    A model with several parts has a `text_config` (or `llm_config`, `language_config`). It may
    repeat values at the top level. The text part's own values win, as in transformers, and the top
    level fills in what it lacks. `quantization_config` is looked for at the top level first, where
    transformers and vLLM read it.

    Attributes:
        model_type: the text part's, where there is one.
        hidden_size: channels of the hidden states.
        head_dim: channels of an attention head.
        num_layers: decoder blocks; 0 where the config says that there are none.
        num_heads: attention heads.
        num_kv_heads: heads of keys and values.
        vocab_size: tokens of the vocabulary.
        max_position_embeddings: tokens of the longest sequence.
        num_experts: experts of a block.
        experts_per_token: of these, how many compute a token.
        expert_size: channels inside an expert, or inside the MLP where the config has one size.
        is_tied: whether the head is the embeddings; True where the config does not say.
        quantization: the `quantization_config`; empty where it is not a table.
    """

    model_type: str | None = None
    hidden_size: int | None = None
    head_dim: int | None = None
    num_layers: int | None = None
    num_heads: int | None = None
    num_kv_heads: int | None = None
    vocab_size: int | None = None
    max_position_embeddings: int | None = None
    num_experts: int | None = None
    experts_per_token: int | None = None
    expert_size: int | None = None
    is_tied: bool = True
    quantization: Mapping[str, Any] | None = None

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> ModelConfig:
        """The values of a parsed `config.json`."""
        levels = (text_part(config), config)

        def first_integer(*keys: str, least: int = 1) -> int | None:
            values = (level.get(key) for level in levels for key in keys)
            return next((v for v in values if type(v) is int and v >= least), None)

        # transformers' own default for a config that does not name the size of a head.
        num_heads = first_integer("num_attention_heads")
        head_dim, hidden_size = first_integer("head_dim"), first_integer("hidden_size")
        if head_dim is None and hidden_size is not None and num_heads is not None:
            head_dim = hidden_size // num_heads or None

        return cls(
            model_type=next((str(x["model_type"]) for x in levels if x.get("model_type")), None),
            hidden_size=first_integer("hidden_size", "n_embd", "d_model"),
            head_dim=head_dim,
            num_layers=first_integer("num_hidden_layers", "n_layer", "num_layers", least=0),
            num_heads=num_heads,
            num_kv_heads=first_integer("num_key_value_heads"),
            vocab_size=first_integer("vocab_size"),
            max_position_embeddings=first_integer("max_position_embeddings"),
            num_experts=first_integer(
                "num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"
            ),
            experts_per_token=first_integer("num_experts_per_tok"),
            expert_size=first_integer("moe_intermediate_size", "intermediate_size"),
            is_tied={level.get("tie_word_embeddings") for level in levels} - {None} != {False},
            quantization=_quantization(config),
        )

    @property
    def quantization_method(self) -> str | None:
        """The method by which the model is quantized already, or None."""
        if self.quantization is None:
            return None
        return str(self.quantization.get("quant_method") or "an unnamed method")


def text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of the text part of a model that has several; empty where it has not."""
    parts = (config.get(key) for key in TEXT_PARTS)
    return next((part for part in parts if isinstance(part, dict)), {})


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """A `config.json` that does not say that the model is quantized."""
    plain = {key: value for key, value in config.items() if key != KEY}
    for part in TEXT_PARTS:
        if isinstance(plain.get(part), dict):
            plain[part] = {key: value for key, value in plain[part].items() if key != KEY}
    return plain


def _quantization(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    table = config.get(KEY) or text_part(config).get(KEY)
    if not table:
        return None
    return table if isinstance(table, dict) else {}
