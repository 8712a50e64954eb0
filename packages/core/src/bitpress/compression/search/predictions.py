"""How far the predictions of models that are nearly the source are from the source's."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from attrs import frozen
from torch import Tensor

from bitpress.modeling import metrics
from bitpress.modeling.metrics import Head
from bitpress.runtime.lanes import Lanes

# Models whose predictions are compared with the source's while those are in memory.
MODELS_TOGETHER = 8


@frozen(eq=False)
class Predictor:
    """A model once its blocks have been run.

    Attributes:
        tokens: of a batch, by its number, the last hidden states (tokens, channels).
        head: what it makes of them.
    """

    tokens: Callable[[int], Tensor]
    head: Head


def sum_divergences(
    source: Predictor, models: Sequence[Predictor], num_batches: int, lanes: Lanes
) -> list[float]:
    """Σ KL divergence over tokens of each model from the source, in nats.

    Args:
        lanes: batches, and models, are compared side by side in these.
    """
    sums = [0.0] * len(models)
    firsts = range(0, len(models), MODELS_TOGETHER)

    def compare(batch: int, first: int) -> list[float]:
        return compare_batch([source, *models[first : first + MODELS_TOGETHER]], batch)

    pairs = list(itertools.product(range(num_batches), firsts))
    results = lanes.map(lambda pair: compare(*pair), pairs)
    for (_, first), divergences in zip(pairs, results, strict=True):
        for number, divergence in enumerate(divergences, first):
            sums[number] += divergence
    return sums


def compare_batch(models: Sequence[Predictor], batch: int) -> list[float]:
    """Σ KL divergence over a batch's tokens of every model from the first, in nats."""
    sums = [0.0] * (len(models) - 1)
    hidden_states = [model.tokens(batch) for model in models]
    heads = [model.head for model in models]
    for _, _, log_probabilities in metrics.compare_logits([hidden_states], heads):
        log_p = next(log_probabilities)
        for i, log_q in enumerate(log_probabilities):
            sums[i] += metrics.kl_divergence(log_p, log_q)
    return sums
