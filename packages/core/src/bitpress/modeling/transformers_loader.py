"""What transformers computes with a model folder, which it reads as its users let it."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def has_decoder() -> bool:
    """Whether the library by which transformers decodes compressed layers is installed."""
    return importlib.util.find_spec("compressed_tensors") is not None


def compute_logits(
    folder: Path, input_ids: Tensor, dtype: torch.dtype, must_dequantize: bool = False
) -> Tensor:
    """The logits of a folder that transformers loads, its activations not quantized.

    Args:
        input_ids: (sequences, length) int64.
        dtype: of the weights that are not compressed, and of activations.
        must_dequantize: whether transformers is told to decode weights while it loads them.

    Returns:
        (sequences, length, vocabulary) in that dtype.
    """
    import transformers

    options: dict[str, Any] = {"dtype": dtype}
    if must_dequantize:
        config = transformers.CompressedTensorsConfig(dequantize=True)
        options["quantization_config"] = config
    model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    with torch.inference_mode():
        # The first call decodes what was left compressed. That it works is a part of the answer.
        logits: Tensor = model(input_ids).logits
        if has_decoder():
            from compressed_tensors.quantization import disable_quantization

            model.apply(disable_quantization)
            logits = model(input_ids).logits
    return logits


def compute_plain_logits(
    config: Mapping[str, Any], weights: Mapping[str, Tensor], input_ids: Tensor, dtype: torch.dtype
) -> Tensor:
    """The logits of a plain model of these weights.

    Args:
        config: the content of its `config.json`.
        weights: by tensor name, of any dtype.
        input_ids: (sequences, length) int64.
        dtype: that the model computes in.

    Returns:
        (sequences, length, vocabulary) in that dtype.
    """
    import transformers

    values = dict(config)
    model_config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(model_config, dtype=dtype)
    state = {name: weight.to(dtype) for name, weight in weights.items()}
    model.load_state_dict(state)
    with torch.inference_mode():
        logits: Tensor = model.eval()(input_ids).logits
    return logits
