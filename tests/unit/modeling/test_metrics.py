"""Sums over tokens are what their definitions say, whatever is computed at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bitpress.errors import CheckpointError
from bitpress.modeling import metrics

CHANNELS, VOCABULARY = 8, 32
# two batches, of 11 and of 5 tokens
BATCHES = tuple(torch.arange(16.0 * CHANNELS).sin().view(16, CHANNELS).split([11, 5]))
GENERATOR = torch.Generator().manual_seed(0)
WEIGHTS = [torch.randn(CHANNELS, VOCABULARY, generator=GENERATOR) for _ in range(2)]


def heads() -> list[metrics.Head]:
    """Of two models; the second counts on the same hidden states."""
    return [lambda hidden, weight=weight: hidden @ weight for weight in WEIGHTS]


def log_probabilities(number: int) -> Tensor:
    """(tokens, vocabulary) float64 of a model, of all tokens at once."""
    return (torch.cat(BATCHES) @ WEIGHTS[number]).double().log_softmax(-1)


@pytest.mark.parametrize(
    ("max_logits", "sizes"),
    [(1, [1] * 16), (4 * VOCABULARY, [1, 4, 4, 2, 4, 1]), (1 << 20, [1, 10, 5])],
    ids=["a token", "four tokens", "a batch"],
)
def test_every_token_is_compared_once(
    monkeypatch: pytest.MonkeyPatch, max_logits: int, sizes: list[int]
) -> None:
    monkeypatch.setattr(metrics, "MAX_LOGITS", max_logits)
    kl, chunks = 0.0, []
    for number, chunk, models in metrics.compare_logits(
        zip(BATCHES, BATCHES, strict=True), heads()
    ):
        log_p, log_q = models
        kl += metrics.kl_divergence(log_p, log_q)
        chunks.append(torch.arange(11 * number, 11 * number + len(BATCHES[number]))[chunk])
    assert [len(chunk) for chunk in chunks] == sizes
    assert torch.equal(torch.cat(chunks), torch.arange(16))
    p, q = log_probabilities(0), log_probabilities(1)
    assert kl == pytest.approx((p.exp() * (p - q)).sum().item(), rel=1e-5)


def test_figures_are_sums_over_tokens() -> None:
    p, q = log_probabilities(0), log_probabilities(1)
    target_ids = torch.arange(16) * 7 % VOCABULARY
    nll = metrics.negative_log_likelihood(q, target_ids)
    assert nll == pytest.approx(-sum(q[i, token].item() for i, token in enumerate(target_ids)))
    assert metrics.perplexity(nll / 16) == pytest.approx(math.exp(nll / 16))
    assert metrics.count_agreements(p, p) == 16
    assert 0 <= metrics.count_agreements(p, q) < 16
    assert math.isfinite(metrics.perplexity(1e9))


def test_vocabularies_of_unlike_size_are_refused() -> None:
    narrow = [heads()[0], lambda hidden: hidden]
    with pytest.raises(CheckpointError, match="vocabularies of unlike size"):
        list(next(metrics.compare_logits(zip(BATCHES, BATCHES, strict=True), narrow))[2])


def test_an_error_is_relative_to_the_reference() -> None:
    reference = torch.tensor([3.0, 4.0])
    distance = metrics.squared_distance(torch.tensor([3.0, 4.5]), reference)
    assert distance == (0.25, 25.0)
    assert metrics.relative_error(*distance) == 0.1
    assert metrics.relative_error(1.0, 0.0) == 0
