"""What the steps of a layer group observe of the tokens that reach it."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bitpress.checkpoint.layer_names import OF_EXPERT
from bitpress.compression.calibration.activation_streams import Arrival
from bitpress.compression.calibration.layer_groups import Site
from bitpress.errors import CheckpointError, SchemeError
from bitpress.planning import memory_estimate
from bitpress.planning.calibration_config import MIN_EXPERT_TOKENS
from bitpress.runtime.process_group import ProcessGroup
from bitpress.schemes import pipeline
from bitpress.schemes.values import Statistic

# tokens on which a layer's output error is measured
SAMPLE = 256

# of a batch's tokens that may be NaN or infinite
UNUSABLE = 1e-3


def nothing(site: Site) -> list[dict[str, Statistic]]:
    """The statistics of no token."""
    return [{} for _ in site.stack.steps]


def observe(
    site: Site, arrivals: Iterable[Arrival]
) -> tuple[list[dict[str, Statistic]], Tensor | None, int]:
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
            pipeline.merge(
                merged,
                pipeline.observe(step, weight, arrival.inputs, arrival.reference, arrival.residual),
            )
        sample, tokens = arrival.inputs[:SAMPLE], tokens + len(arrival.inputs)
    return stats, sample, tokens


def _joined(arrivals: Iterable[Arrival]) -> Iterator[Arrival]:
    """`OBSERVED` tokens and more at a time: statistics are large, and adding them up costs."""
    for _, alike in itertools.groupby(arrivals, lambda arrival: arrival.reference is None):
        waiting: list[Arrival] = []
        for arrival in alike:
            waiting.append(arrival)
            if sum(len(a.inputs) for a in waiting) >= memory_estimate.STATISTICS_TOKENS:
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
            "the model itself makes them (or its weights are damaged); check that it runs in this "
            "precision"
        )
    return arrival.only(good)


# experts that are named
TOLD = 4


def few(tokens: Mapping[str, int]) -> Iterator[str]:
    """A line for each block's experts of which some are sent few tokens.

    Args:
        tokens: by layer of an expert.
    """
    found: dict[str, dict[str, int]] = {}
    for module, count in tokens.items():
        if place := OF_EXPERT.fullmatch(module):
            found.setdefault(place["experts"], {})[place["number"]] = count
    for experts, counts in found.items():
        short = {number: count for number, count in counts.items() if count < MIN_EXPERT_TOKENS}
        if short:
            names = ", ".join(
                f"{number} ({count} tokens)" for number, count in list(short.items())[:TOLD]
            )
            yield (
                f"{experts}: {len(short)} of {len(counts)} experts were sent fewer than "
                f"{MIN_EXPERT_TOKENS} tokens and are compressed as without data: "
                f"{names}{', ...' if len(short) > TOLD else ''}; give more text, or --all-experts"
            )


def reduce_statistics(
    process_group: ProcessGroup,
    stats: Sequence[dict[str, Statistic]],
    owner: int,
    device: torch.device,
) -> list[dict[str, Statistic]]:
    """Statistics of all ranks, merged, for their owner; the others get nothing. What was given is
    used up.

    A rank whose tokens gave none of a kind takes part with zeros, or with what any number is
    larger than.
    """
    if process_group.world_size == 1:
        return list(stats)
    merged = []
    for own, kinds in zip(stats, _kinds(process_group, stats), strict=True):
        found: dict[str, Statistic] = {}
        for name, (shape, dtype, merge, rows, kind) in kinds.items():
            stat = own.pop(name, None)
            if stat is None:
                # counts may lie on the CPU
                place = device if kind == device.type else torch.device(kind)
                value = torch.full(
                    shape, 0.0 if merge == "sum" else -torch.inf, dtype=dtype, device=place
                )
            else:
                # two may be one tensor
                value = stat.value.clone(memory_format=torch.contiguous_format)
            process_group.reduce(value.reshape(-1), owner, merge)
            if process_group.rank == owner:
                found[name] = Statistic(value, merge, rows)
        merged.append(found)
    return merged


def _kinds(
    process_group: ProcessGroup, stats: Sequence[dict[str, Statistic]]
) -> list[dict[str, Any]]:
    """What statistics any rank has, step by step, in one order for all."""
    mine = [
        {
            n: (tuple(s.value.shape), s.value.dtype, s.merge, s.rows, s.value.device.type)
            for n, s in own.items()
        }
        for own in stats
    ]
    union: list[dict[str, Any]] = [{} for _ in stats]
    for theirs in process_group.all_gather_object(mine):
        for known, step in zip(union, theirs, strict=True):
            for name, kind in step.items():
                if known.setdefault(name, kind) != kind:
                    raise SchemeError(
                        f"statistics {name!r} of two ranks are {known[name]} and {kind}, and "
                        "cannot be added up"
                    )
    return union
