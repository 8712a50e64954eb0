"""What a site's steps note of the tokens that come to it."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from bitpress import chain
from bitpress.calibrate import memory
from bitpress.calibrate.sites import Site
from bitpress.calibrate.streams import Arrival
from bitpress.errors import CheckpointError
from bitpress.layer import Stat

# tokens on which a layer's output error is measured
SAMPLE = 256
# of a batch's tokens that may be NaN or infinite
UNUSABLE = 1e-3


def nothing(site: Site) -> list[dict[str, Stat]]:
    """The statistics of no token."""
    return [{} for _ in site.stack.steps]


def observe(
    site: Site, arrivals: Iterable[Arrival]
) -> tuple[list[dict[str, Stat]], Tensor | None, int]:
    """Every step's statistics over all batches, a sample of the inputs (tokens, in), and the number
    of tokens.
    """
    stats, sample, tokens = nothing(site), None, 0
    if not site.stack.calibrated:
        return stats, sample, tokens
    weight = site.weight
    # in the source's block the router sends it other tokens
    if site.routed:
        arrivals = (Arrival(arrival.inputs) for arrival in arrivals if len(arrival.inputs))
    for arrival in map(functools.partial(_usable, site.stack.name), _joined(arrivals)):
        for step, merged in zip(site.stack.steps, stats, strict=True):
            chain.merge(
                merged,
                chain.observe(step, weight, arrival.inputs, arrival.reference, arrival.residual),
            )
        sample, tokens = arrival.inputs[:SAMPLE], tokens + len(arrival.inputs)
    return stats, sample, tokens


def _joined(arrivals: Iterable[Arrival]) -> Iterator[Arrival]:
    """`OBSERVED` tokens and more at a time: statistics are large, and adding them up costs."""
    for _, alike in itertools.groupby(arrivals, lambda arrival: arrival.reference is None):
        waiting: list[Arrival] = []
        for arrival in alike:
            waiting.append(arrival)
            if sum(len(a.inputs) for a in waiting) >= memory.OBSERVED:
                yield Arrival.joined(waiting)
                waiting = []
        if waiting:
            yield Arrival.joined(waiting)


def _usable(name: str, arrival: Arrival) -> Arrival:
    """Tokens whose numbers are finite; raises CheckpointError where too many are not."""
    tensors = [
        tensor
        for tensor in (arrival.inputs, arrival.reference, arrival.residual)
        if tensor is not None
    ]
    if all(math.isfinite(tensor.sum()) for tensor in tensors):
        return arrival
    good = torch.stack([tensor.isfinite().all(1) for tensor in tensors]).all(0)
    bad = len(good) - int(good.sum())
    if bad > UNUSABLE * len(good):
        raise CheckpointError(
            f"layer {name}: {bad} of {len(good)} calibration tokens reach it as NaN or infinity: "
            "the model itself makes them "
            "(or its weights are damaged); check that it runs in this precision"
        )
    return arrival.only(good)
