"""How far the predictions of two models are apart, and how far two tensors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from bitpress.errors import CheckpointError
from bitpress.planning.memory_estimate import MAX_LOGITS

# In place of the token that follows one, where that is none to be predicted.
NO_TARGET = -100

# What makes logits (tokens, vocabulary) of a model's last hidden states (tokens, channels).
Head = Callable[[Tensor], Tensor]


def compare_logits(
    batches: Iterable[Sequence[Tensor]], heads: Sequence[Head]
) -> Iterator[tuple[int, slice, Iterator[Tensor]]]:
    """What several models expect to follow each token, for a few tokens of a batch at a time.

    Sums over tokens are the caller's: of which tokens, and in which order, decides their last
    digits.

    Args:
        batches: of each batch every model's last hidden states, (tokens, channels).
        heads: of the same models in the same order.

    Yields:
        The number of the batch, the chunk of its tokens, and in the order of the models their
        log-probabilities, (tokens, vocabulary) float32. Those of the first model are at hand, the
        others are computed one by one, when the iterator comes to them.

    Raises:
        CheckpointError: the models have vocabularies of unlike size.
    """
    # one token shows how large the vocabulary is
    num_tokens = 1
    for number, hidden_states in enumerate(batches):
        start = 0
        while start < len(hidden_states[0]):
            chunk = slice(start, start + num_tokens)
            models = _log_probabilities([hidden[chunk] for hidden in hidden_states], heads)
            first = next(models)
            start, num_tokens = chunk.stop, max(MAX_LOGITS // first.shape[1], 1)
            yield number, chunk, itertools.chain([first], models)


def _log_probabilities(hidden_states: Sequence[Tensor], heads: Sequence[Head]) -> Iterator[Tensor]:
    vocab_size = None
    for head, hidden in zip(heads, hidden_states, strict=True):
        log_probabilities = head(hidden).float().log_softmax(-1)  # (tokens, vocabulary)
        if vocab_size not in (None, log_probabilities.shape[1]):
            raise CheckpointError(
                "the models have vocabularies of unlike size: their predictions cannot be compared"
            )
        vocab_size = log_probabilities.shape[1]
        yield log_probabilities


def negative_log_likelihood(log_q: Tensor, target_ids: Tensor) -> float:
    """Σ -log q of the tokens that follow, in nats.

    Args:
        log_q: log-probabilities, (tokens, vocabulary).
        target_ids: the token that follows each, (tokens,) int64.
    """
    return -float(log_q.gather(1, target_ids[:, None]).sum(dtype=torch.float64))


def kl_divergence(log_p: Tensor, log_q: Tensor) -> float:
    """Σ p (log p - log q) over tokens, in nats: what using q in place of p costs.

    Args:
        log_p: log-probabilities of the reference, (tokens, vocabulary).
        log_q: those of the model, of the same shape.
    """
    terms = nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none")
    return float(terms.sum(dtype=torch.float64))


def count_agreements(log_p: Tensor, log_q: Tensor) -> int:
    """Tokens (rows) for which two models expect the same token most."""
    return int((log_p.argmax(-1) == log_q.argmax(-1)).sum())


def perplexity(nats: float) -> float:
    """E to the mean negative log-likelihood of a token, which is given in nats."""
    # e^700 is 1e304: no float holds much more
    return math.exp(min(nats, 700.0))


def squared_distance(tensor: Tensor, reference: Tensor) -> tuple[float, float]:
    """||x - y||² and ||y||² of a tensor x and its reference y, summed in float64."""
    error = float((tensor - reference).square().sum(dtype=torch.float64))
    norm = float(reference.square().sum(dtype=torch.float64))
    return error, norm


def relative_error(squared_error: float, squared_norm: float) -> float:
    """||x - y|| / ||y||, of `squared_distance` or of its sums over tensors; 0 where y is zero."""
    return math.sqrt(squared_error / squared_norm) if squared_norm else 0.0
