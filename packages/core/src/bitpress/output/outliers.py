"""Layers whose weights fit their format much worse than those of the other layers do.

How far rounding moves weights is nearly the same for all layers of one format: in floating point it
hardly depends on the weights (FP8 moves each layer by 2.6 %), and with integers it varies within a
factor of 1.3 or so as long as no channel has outliers. So the error to be expected of a format is
the median of the layers that went through the same steps and have the same bits per weight, and a
layer of more than twice that is an outlier: a few of its weights stretch the scales of all others.

Schemes that feed errors forward move weights further on purpose, some six times as far. What counts
for them is the error that plain rounding would have had, which the manifest holds too.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping

from attrs import frozen

from bitpress.output.manifest import LayerRecord

# How many times the median an outlier exceeds.
OUTLIER_RATIO = 2.0

# Layers of one format from which on a median says something.
MIN_LAYERS = 4


@frozen
class Outlier:
    """A layer that fits its format badly.

    Attributes:
        error: ||rounded - source|| / ||source||.
        median: of the layers of the same format.
    """

    module: str
    error: float
    median: float


def find_outliers(layers: Mapping[str, LayerRecord]) -> list[Outlier]:
    """The layers that fit their format badly, the worst first."""
    errors_of: dict[tuple[object, ...], dict[str, float]] = defaultdict(dict)
    for module, layer in layers.items():
        error = layer.error if layer.rounding_error is None else layer.rounding_error
        if error is not None:
            errors_of[layer.steps, round(layer.bits)][module] = error

    outliers = []
    for errors in errors_of.values():
        median = statistics.median(errors.values())
        if len(errors) < MIN_LAYERS:
            continue
        outliers += [
            Outlier(module, error, median)
            for module, error in errors.items()
            if error > OUTLIER_RATIO * median
        ]
    return sorted(outliers, key=lambda outlier: -outlier.error / max(outlier.median, 1e-30))
