"""Sequences of tokens are cut from a text so that each begins as the tokenizer begins a text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def find_prefix(tokenizer: Any) -> Tensor:
    """What a tokenizer puts before a text: BOS mostly, several tokens for some, or none; (tokens,)
    int64.
    """
    begun = tokenizer("x", verbose=False)["input_ids"]
    bare = tokenizer("x", add_special_tokens=False, verbose=False)["input_ids"]
    starts = range(len(begun) - len(bare) + 1) if bare else ()
    start = next((i for i in starts if begun[i : i + len(bare)] == bare), 0)
    return torch.tensor(begun[:start], dtype=torch.int64)


def begins_with(tokens: Tensor, prefix: Tensor) -> bool:
    """Whether tokens begin with a prefix, as those of a chat do whose template writes BOS."""
    return torch.equal(tokens[: len(prefix)], prefix)


def cut_sequences(tokens: Tensor, prefix: Tensor, length: int, overlap: int = 0) -> Tensor:
    """Full sequences that begin with the prefix and cover the tokens from their start.

    Args:
        tokens: of a text without prefix, (tokens,) int64; there are enough for one sequence.
        prefix: (prefix tokens,) int64, fewer than `length`. Where tokens have it themselves at the
            start of a sequence, it is not put before them a second time.
        length: of a sequence, the prefix included.
        overlap: tokens that a sequence without a prefix shares with the one before it.

    Returns:
        (sequences, length) int64.
    """
    if not len(prefix):
        return tokens.unfold(0, length, length - overlap)
    sequences: list[Tensor] = []
    start = 0
    while True:
        head = prefix[:0] if begins_with(tokens[start:], prefix) else prefix
        end = start + length - len(head)
        if end > len(tokens):
            return torch.stack(sequences)
        sequences.append(torch.cat([head, tokens[start:end]]))
        start = end
