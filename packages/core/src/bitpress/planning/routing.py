"""What part of the tokens comes to each matrix of a block, where a router chooses experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bitpress.checkpoint import layer_names
from bitpress.checkpoint.safetensors import Entry


def token_shares(
    entries: Sequence[Entry], experts_per_token: int | None
) -> Callable[[Entry], float]:
    """The share of a matrix of a block: an expert is sent the tokens that a router chooses it for,
    on average.

    Args:
        entries: the block's tensors.
        experts_per_token: how many experts compute a token; None where that is not known: all.
    """
    matches = {
        entry.name: layer_names.OF_EXPERT.fullmatch(entry.name.removesuffix(".weight"))
        for entry in entries
    }
    num_experts = len({match["number"] for match in matches.values() if match})

    def share_of(entry: Entry) -> float:
        experts = 0
        if matches[entry.name]:
            experts = num_experts
        elif ".experts." in entry.name and len(entry.shape) == 3:
            experts = entry.shape[0]
        return min((experts_per_token or experts) / experts, 1.0) if experts else 1.0

    return share_of
