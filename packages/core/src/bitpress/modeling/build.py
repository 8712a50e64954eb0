"""Models of any architecture that transformers knows, built without their weights."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from bitpress.checkpoint.model_config import KEY
from bitpress.checkpoint.reader import Checkpoint
from bitpress.errors import CheckpointError


def build_model(
    checkpoint: Checkpoint, trust_remote_code: bool, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """The model on the meta device; buffers, which are computed and not stored, are real, and of
    that dtype.

    Raises:
        CheckpointError: transformers cannot build it.
    """
    import transformers

    num_layers = checkpoint.model_config.num_layers
    # building them would go on for ever
    if num_layers is not None and num_layers > len(checkpoint.entries):
        raise CheckpointError(
            f"{checkpoint.folder}: config.json says {num_layers} blocks, and the files hold fewer "
            "tensors than that"
        )
    try:
        # trusted code may lie in another repository
        with contextlib.nullcontext() if trust_remote_code else _hub_closed():
            config = transformers.AutoConfig.from_pretrained(
                checkpoint.folder, trust_remote_code=trust_remote_code
            )
            # a rotated model has a head of its own, whatever the folder's file says
            if checkpoint.config.get("tie_word_embeddings") is False:
                config.tie_word_embeddings = False
            for part in (config, config.get_text_config()):
                # weights are given as they are computed with
                part.__dict__.pop(KEY, None)
            _choose_implementations(config)
            with _parameters_on_meta():
                model = _from_config(config, trust_remote_code, dtype)
    except Exception as e:
        # whatever its parsers and its models raise for a config that is not what it says
        fact = re.sub(r"\s+", " ", str(e)).strip()
        hint = ""
        if not trust_remote_code and "trust_remote_code" in fact:
            hint = "; --trust-remote-code allows the model's own code"
        raise CheckpointError(
            f"{checkpoint.folder}: transformers cannot build the model: {fact[:300]}{hint}"
        ) from None
    return model.eval()


@contextlib.contextmanager
def _hub_closed() -> Iterator[None]:
    """Nothing is fetched inside: a config may name another model, for example as the backbone of
    its vision part, and transformers would load its weights.
    """
    from huggingface_hub import constants

    was_closed = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = was_closed


def _choose_implementations(config: Any) -> None:
    """Let transformers choose how attention and experts are computed. A config may name a kernel,
    and transformers would fetch its code from the Hub and run it.
    """
    config._attn_implementation = None
    config._experts_implementation = None
    for part in list(vars(config).values()):
        # A config within another; not all are among its `sub_configs`.
        if hasattr(part, "_attn_implementation"):
            _choose_implementations(part)


def _from_config(config: Any, trust_remote_code: bool, dtype: torch.dtype) -> nn.Module:
    """The whole of a model that also sees, where the config is one's; its text part alone has other
    names. A class that neither of transformers' tasks knows is the one that the config names.
    """
    import transformers

    vision_model: Callable[..., nn.Module] = transformers.AutoModelForImageTextToText.from_config
    text_model: Callable[..., nn.Module] = transformers.AutoModelForCausalLM.from_config
    named = getattr(transformers, str((config.architectures or [None])[0]), None)
    # Such a class has a decoder alone beside it, with other names.
    if named is not None and getattr(config, "is_encoder_decoder", False):
        return named._from_config(config, dtype=dtype)  # type: ignore[no-any-return]
    # Asked first: the refusal names every class that would do, and imports 260 modules for that.
    has_vision = type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if has_vision or getattr(config, "auto_map", None):
        try:
            return vision_model(config, trust_remote_code=trust_remote_code, dtype=dtype)
        except ValueError as e:
            if "Unrecognized configuration class" not in str(e):
                raise
    has_text = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    if named is not None and not has_text and not getattr(config, "auto_map", None):
        return named._from_config(config, dtype=dtype)  # type: ignore[no-any-return]
    return text_model(config, trust_remote_code=trust_remote_code, dtype=dtype)


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters lose their numbers as soon as they are registered, and none are initialized: no
    weight is ever in memory.
    """
    register, has_ended = nn.Module.register_parameter, False
    names = [name for name in dir(nn.init) if name.endswith("_") and not name.startswith("_")]
    initializers = {name: getattr(nn.init, name) for name in names}

    def register_on_meta(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(self, name, parameter)

    def skip(initializer: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        """Whoever is imported meanwhile may keep it for good, so that it has to work afterwards."""

        def initialize(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            return initializer(tensor, *args, **kwargs) if has_ended else tensor

        return initialize

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    for name in names:
        setattr(nn.init, name, skip(initializers[name]))
    try:
        yield
    finally:
        has_ended = True
        nn.Module.register_parameter = register  # type: ignore[method-assign]
        for name, function in initializers.items():
            setattr(nn.init, name, function)
