"""How far the predictions of two models are apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from attrs import frozen
from torch import Tensor, nn

from bitpress.errors import CheckpointError
from bitpress.modeling.block_runner import _Run

# numbers that are made at a time, for each model
LOGITS = 1 << 23

Logits = Callable[[Tensor], Tensor]


@frozen
class _Sums:
    """Over tokens: -log q and -log p of what follows, Σ p (log p - log q), and how often both
    expect the same.
    """

    nll: float
    nll_against: float
    kl: float
    same: int


def _compare(runs: Sequence[_Run], heads: Sequence[Logits], targets: Sequence[Tensor]) -> _Sums:
    nll = nll_against = kl = 0.0
    same = 0
    for made, wanted in _pieces(runs, heads, targets):
        q = made[0].float().log_softmax(-1)  # (tokens, vocabulary)
        nll -= float(q.gather(1, wanted).sum(dtype=torch.float64))
        if len(made) > 1:
            p = made[1].float().log_softmax(-1)
            nll_against -= float(p.gather(1, wanted).sum(dtype=torch.float64))
            same += int((p.argmax(-1) == q.argmax(-1)).sum())
            kl += divergence(p, q)
    return _Sums(nll, nll_against, kl, same)


def divergence(expected: Tensor, found: Tensor) -> float:
    """Σ p (log p - log q) over tokens, of the logarithms (tokens, vocabulary) of what one model
    expects, and another.
    """
    return float(
        nn.functional.kl_div(found, expected, log_target=True, reduction="none").sum(
            dtype=torch.float64
        )
    )


def _pieces(
    runs: Sequence[_Run], heads: Sequence[Logits], targets: Sequence[Tensor]
) -> Iterator[tuple[list[Tensor], Tensor]]:
    """For a few tokens at a time each model's logits (tokens, vocabulary), and the tokens that
    follow (tokens, 1).
    """
    count = 1
    for i, batch in enumerate(targets):
        states = [run.states[i].flatten(0, -2) for run in runs]  # (tokens, channels)
        wanted, at = batch.reshape(-1, 1), 0
        while at < len(wanted):
            made = [
                logits(state[at : at + count].to(run.device))
                for logits, state, run in zip(heads, states, runs, strict=False)
            ]
            if len({logits.shape[1] for logits in made}) > 1:
                raise CheckpointError(
                    "the models have vocabularies of unlike size: their predictions cannot be "
                    "compared"
                )
            yield made, wanted[at : at + count].to(made[0].device)
            at, count = at + count, max(LOGITS // made[0].shape[1], 1)


def _perplexity(nats: float) -> float:
    # beyond it no float holds it
    return math.exp(min(nats, 700.0))
