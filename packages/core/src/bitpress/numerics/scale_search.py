"""The scale of each group of weights, the one of several candidates that costs the group least.

What rounding costs a number depends only on where in its group's span the number lies. So it is
worked out beforehand for narrow places of the span, all candidates side by side; what each of them
costs a group is a sum of such rows, and one pass over the weights gives the costs of all.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Hashable

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

# Weights that are looked up at a time: they stay in a core's cache. On a GPU they are more, as each
# launch costs the same for any number of them.
WEIGHTS_PER_CHUNK, WEIGHTS_PER_CHUNK_ON_GPU = 1 << 18, 1 << 24

# Numbers in each place whose costs are averaged.
SAMPLES = 4

# Tables of rounding costs that are kept.
MAX_TABLES = 16

# Positions are shrunk by so much that the end of the span still belongs to its last place.
SHRINK = 1 - 2.0**-16


def rounding_costs(nearest: Callable[[Tensor], Tensor], places: int = 1 << 12) -> Tensor:
    """The mean of (x - q)² in each of so many equal places from -1 to 1.

    Args:
        nearest: given numbers (count, 1), what each candidate makes of them: (count, candidates).
        places: into how many the span is cut.

    Returns:
        (places, candidates) float32.
    """
    count = places * SAMPLES
    x = (torch.arange(1 - count, count, 2) / count).unsqueeze(1)
    return (nearest(x) - x).square_().view(places, SAMPLES, -1).mean(1)


def table_for_device(
    device: torch.device, make: Callable[..., Tensor], *arguments: Hashable
) -> Tensor:
    """A table that a function makes on the CPU, on a device; the last few are kept.

    Of a GPU each thread has tables of its own: another thread's stream would not wait until one is
    there, and would not be waited for before one is dropped.

    Args:
        make: makes it of the arguments.
    """
    if device.type == "cpu":
        return _keep_table(make, *arguments)
    if not hasattr(_OWN, "copy_table"):
        _OWN.copy_table = functools.lru_cache(MAX_TABLES)(_copy_table)
    return _OWN.copy_table(device, make, *arguments)  # type: ignore[no-any-return]


# What a thread keeps.
_OWN = threading.local()


@functools.lru_cache(MAX_TABLES)
def _keep_table(make: Callable[..., Tensor], *arguments: Hashable) -> Tensor:
    return make(*arguments)


def _copy_table(device: torch.device, make: Callable[..., Tensor], *arguments: Hashable) -> Tensor:
    return _keep_table(make, *arguments).to(device)


# Public: schemes of other packages call it with these arguments.
def search_scales(  # noqa: PLR0913
    weight: Tensor,
    importance: Tensor | None,
    group: int,
    table: Tensor,
    span: Tensor,
    *,
    kind: Tensor | None = None,
) -> Tensor:
    """Which candidate has the least Σ importance (w - q)² in each group.

    Args:
        weight: (out, in) float32, the width a multiple of `group`.
        importance: (in,) what an error costs in each column; None where all cost the same.
        group: columns that share a scale.
        table: (kinds, places, candidates) float32: for each kind of group its `rounding_costs`,
            weights in units of the span.
        span: (out, groups) float32.
        kind: (out, groups) whole numbers, where there are several.

    Returns:
        (out, groups) int32, positions among the candidates.
    """
    num_kinds, num_places, num_candidates = table.shape
    if num_candidates == 1:
        return torch.zeros_like(span, dtype=torch.int32)

    # The tables of all kinds lie one below the other; a weight of 0 is in the middle of its own.
    origin = torch.zeros_like(span) if kind is None else kind * float(num_places)
    origin.add_(num_places / 2)
    is_on_cpu = weight.device.type == "cpu"
    num_weights = WEIGHTS_PER_CHUNK if is_on_cpu else WEIGHTS_PER_CHUNK_ON_GPU
    rows_per_chunk = min(max(num_weights // weight.shape[1], 1), len(weight))
    relative_importance = None
    if importance is not None:
        relative = importance / importance.amax()
        relative_importance = relative.expand(rows_per_chunk, -1).reshape(-1, group)

    # Shared by all chunks: memory that is allocated anew for each would be paged in each time.
    position_buffer, row_buffer = (
        weight.new_empty(rows_per_chunk, span.shape[1], group, dtype=dtype)
        for dtype in (torch.float32, torch.int32)
    )

    best = []
    for first in range(0, len(weight), rows_per_chunk):
        rows = slice(first, min(first + rows_per_chunk, len(weight)))
        position = position_buffer[: rows.stop - first]  # (rows, groups, group)
        torch.div(to_groups(weight[rows], group), span[rows].unsqueeze(2), out=position)
        position.mul_(num_places / 2 * SHRINK).add_(origin[rows].unsqueeze(2))

        # A NaN is clamped to some row of the table: only the scheme may refuse it.
        table_row = row_buffer[: rows.stop - first]
        table_row.copy_(position).clamp_(0, num_kinds * num_places - 1)
        table_row = table_row.view(-1, group)

        # An embedding bag sums the table's rows of a group without storing them one by one.
        weights = None if relative_importance is None else relative_importance[: len(table_row)]
        costs = embedding_bag(
            table_row, table.view(-1, num_candidates), mode="sum", per_sample_weights=weights
        )  # (rows * groups, candidates)
        best.append(_argmin_(costs))
    return torch.cat(best).view_as(span)


def _argmin_(x: Tensor) -> Tensor:
    """Where in each row the least number is, the first of those within 2^-16 of it: (rows, few) ->
    (rows,) int32. x is overwritten.
    """
    # None is negative, so that they have the order of their bits. The lowest bits make room for the
    # position, which the least number then carries with it.
    position_mask = (1 << (x.shape[1] - 1).bit_length()) - 1
    positions = torch.arange(x.shape[1], dtype=torch.int32, device=x.device)
    with_position = x.view(torch.int32).bitwise_and_(~position_mask).bitwise_or_(positions)
    return with_position.amin(1).bitwise_and_(position_mask)


def to_groups(x: Tensor, group: int) -> Tensor:
    """A view, where possible, of (out, in) as (out, groups, group)."""
    return x.reshape(len(x), -1, group)
