"""Blocks that draft tokens for the decoder (multi-token prediction), and what vLLM calls them."""

from __future__ import annotations

import re
from collections.abc import Iterable

from bitpress.checkpoint.layer_names import BLOCK, OUTSIDE

# The name of a list of such blocks.
DRAFTS = re.compile(r"mtp|nextn", re.IGNORECASE)

# Lists whose class in vLLM reads what is outside the blocks as it is.
PLAIN_OUTSIDE = re.compile(r"\.mtp_(layers|block)\.")

# The list in which most of vLLM's classes for drafts count them, whatever the files call it.
IN_VLLM = "model.layers"


def names_in_vllm(tensors: Iterable[str], num_layers: int | None) -> dict[str, str]:
    """What vLLM 0.32 looks for in the config where a list of its own holds layers of drafts: it
    counts such blocks on from those of the decoder.

    Args:
        tensors: names in the files.
        num_layers: blocks of the decoder, as the config says.

    Returns:
        The name in vLLM, by the layer's name in the files.
    """
    names: dict[str, str] = {}
    for tensor in tensors:
        match = BLOCK.fullmatch(tensor) if DRAFTS.search(tensor) else None
        if match and num_layers is not None:
            number = num_layers + int(match["index"])
            names[tensor.removesuffix(".weight")] = f"{IN_VLLM}.{number}.{match['inside']}"
    return names


def read_plain_layers(tensors: Iterable[str]) -> bool:
    """Whether vLLM's class for drafts reads head and embeddings as they are stored in the source:
    those for the lists of MiMo and Ernie 4.5 pass no config on to them.
    """
    return any(PLAIN_OUTSIDE.search(name) for name in tensors)


def has_drafts(tensors: Iterable[str], num_layers: int | None) -> bool:
    """Whether the files hold such blocks: in a list of their own, or beyond those of the decoder.

    Args:
        tensors: names in the files.
        num_layers: blocks of the decoder, as the config says.
    """
    if num_layers is None:
        return False
    weights = [name for name in tensors if name.endswith(".weight")]
    decoder = [
        match for name in weights if not OUTSIDE.search(name) and (match := BLOCK.match(name))
    ]
    return bool(names_in_vllm(weights, num_layers)) or any(
        int(match["index"]) >= num_layers for match in decoder
    )


def patterns_to_ignore(names: Iterable[str]) -> list[str]:
    """One pattern for all layers of each block of drafts.

    Args:
        names: of layers in vLLM.
    """
    length = IN_VLLM.count(".") + 2
    blocks = dict.fromkeys(".".join(name.split(".")[:length]) for name in names)
    return [rf"re:{re.escape(block)}\..*" for block in blocks]
