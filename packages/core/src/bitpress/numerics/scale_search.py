"""The scale of each group of weights, the one of several candidates that costs the group least.

What rounding costs a number depends only on where in its group's span the number lies. So it is
worked out beforehand for narrow places of the span, all candidates side by side; what each of them
costs a group is a sum of such rows, and one pass over the weights gives the costs of all.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

# Weights that are looked up at a time: they stay in cache.
CHUNK = 1 << 18

# Numbers of a place whose costs are averaged.
SAMPLES = 4

# A share of the span, so that its end still belongs to its last place.
SHORT = 1 - 2.0**-16


def rounding_costs(nearest: Callable[[Tensor], Tensor], places: int = 1 << 12) -> Tensor:
    """The mean of (x - q)² in each of so many equal places from -1 to 1: (places, candidates)
    float32.

    Args:
        nearest: given numbers (count, 1), what each candidate makes of them: (count, candidates).
    """
    count = places * SAMPLES
    x = (torch.arange(1 - count, count, 2) / count).unsqueeze(1)
    return (nearest(x) - x).square_().view(places, SAMPLES, -1).mean(1)


def search_scales(
    weight: Tensor,
    importance: Tensor | None,
    group: int,
    table: Tensor,
    span: Tensor,
    *,
    kind: Tensor | None = None,
) -> Tensor:
    """Which candidate has the least Σ importance (w - q)² in each group: (out, groups) int32.

    Args:
        weight: (out, in) float32, the width a multiple of `group`.
        importance: (in,) what an error costs in each column; None where all cost the same.
        table: (kinds, places, candidates) float32: for each kind of group its `rounding_costs`,
            weights in units of the span.
        span: (out, groups) float32.
        kind: (out, groups) integers, where there are several.
    """
    kinds, places, candidates = table.shape
    if candidates == 1:
        return torch.zeros_like(span, dtype=torch.int32)
    start = (torch.zeros_like(span) if kind is None else kind * float(places)).add_(places / 2)
    height, best = min(max(CHUNK // weight.shape[1], 1), len(weight)), []
    shares = None
    if importance is not None:
        shares = (importance / importance.amax()).expand(height, -1).reshape(-1, group)
    position_buffer, row_buffer = (
        weight.new_empty(height, span.shape[1], group, dtype=dtype)
        for dtype in (torch.float32, torch.int32)
    )

    for first in range(0, len(weight), height):
        rows = slice(first, min(first + height, len(weight)))
        position = position_buffer[: rows.stop - first]  # (rows, groups, group)
        torch.div(to_groups(weight[rows], group), span[rows].unsqueeze(2), out=position)
        position.mul_(places / 2 * SHORT).add_(start[rows].unsqueeze(2))

        # A NaN is clamped to some row of the table: only the scheme may refuse it.
        table_row = row_buffer[: rows.stop - first]
        table_row.copy_(position).clamp_(0, kinds * places - 1)
        table_row = table_row.view(-1, group)
        share = None if shares is None else shares[: len(table_row)]
        costs = embedding_bag(
            table_row, table.view(-1, candidates), mode="sum", per_sample_weights=share
        )
        best.append(_least(costs))
    return torch.cat(best).view_as(span)


def _least(x: Tensor) -> Tensor:
    """Where in each row the least number is, the first of those within 2^-16 of it: (rows, few) ->
    (rows,) int32.

    None is negative, so that they are ordered as their bits are; the last of these make room for
    the place. x is lost.
    """
    mask = (1 << (x.shape[1] - 1).bit_length()) - 1
    places = torch.arange(x.shape[1], dtype=torch.int32, device=x.device)
    return x.view(torch.int32).bitwise_and_(~mask).bitwise_or_(places).amin(1).bitwise_and_(mask)


def to_groups(x: Tensor, group: int) -> Tensor:
    """(out, in) -> (out, groups, group)."""
    return x.reshape(len(x), -1, group)
