"""The scale of each group of weights, the one of several candidates that costs the group least.

What rounding costs a number depends only on where in its group's span the number lies. So it is
worked out beforehand for narrow places of the span, all candidates side by side; what each of them
costs a group is a sum of such rows, and one pass over the weights gives the costs of all.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Hashable, Sequence

import torch
from attrs import frozen
from torch import Tensor
from torch.nn.functional import embedding_bag

from bitpress.runtime.batching import batched, stack

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
    """Which candidate has the least Σ importance (w - q)² in each group; those of layers that are
    solved side by side are looked up together.

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
    if table.shape[2] == 1:
        return torch.zeros_like(span, dtype=torch.int32)
    search = _Search(weight, importance, group, table, span, kind)
    return batched(_search_layers, search, search.form)


@frozen(eq=False)
class _Search:
    """Arguments of `search_scales`."""

    weight: Tensor
    importance: Tensor | None
    group: int
    table: Tensor
    span: Tensor
    kind: Tensor | None

    @property
    def form(self) -> Hashable:
        """What searches have in common that are made together."""
        weight, kinds = self.weight, (self.importance is None, self.kind is None)
        return weight.shape, weight.device, self.group, id(self.table), kinds


def _search_layers(searches: Sequence[_Search]) -> list[Tensor]:
    """Searches that have the same form, made together for as many layers as are looked up at a
    time.
    """
    weight = searches[0].weight
    num_weights = WEIGHTS_PER_CHUNK if weight.device.type == "cpu" else WEIGHTS_PER_CHUNK_ON_GPU
    step = max(num_weights // weight.numel(), 1)
    chunks = (searches[first : first + step] for first in range(0, len(searches), step))
    return [best for chunk in chunks for best in _search_chunk(chunk, num_weights)]


def _search_chunk(searches: Sequence[_Search], num_weights: int) -> Sequence[Tensor]:
    """The same for a few layers, of which so many weights are looked up at a time: of several all,
    of one a few rows.
    """
    group, table = searches[0].group, searches[0].table
    num_kinds, num_places, num_candidates = table.shape
    weight, span = (stack([getattr(s, name) for s in searches]) for name in ("weight", "span"))
    num_layers, num_rows, width = weight.shape
    rows_per_chunk = min(max(num_weights // width, 1), num_rows)

    # The tables of all kinds lie one below the other; a weight of 0 is in the middle of its own.
    kinds = [search.kind for search in searches if search.kind is not None]
    origin = stack(kinds) * float(num_places) if kinds else torch.zeros_like(span)
    origin.add_(num_places / 2)
    importance = _importance_of_rows(searches, rows_per_chunk)

    # Shared by all chunks: memory that is allocated anew for each would be paged in each time.
    position_buffer, row_buffer = (
        weight.new_empty(num_layers, rows_per_chunk, span.shape[2], group, dtype=dtype)
        for dtype in (torch.float32, torch.int32)
    )

    best = []
    for first in range(0, num_rows, rows_per_chunk):
        rows = slice(first, min(first + rows_per_chunk, num_rows))
        position = position_buffer[:, : rows.stop - first]  # (layers, rows, groups, group)
        in_groups = weight[:, rows].reshape_as(position)
        torch.div(in_groups, span[:, rows].unsqueeze(3), out=position)
        position.mul_(num_places / 2 * SHRINK).add_(origin[:, rows].unsqueeze(3))

        # A NaN is clamped to some row of the table: only the scheme may refuse it.
        table_row = row_buffer[:, : rows.stop - first]
        table_row.copy_(position).clamp_(0, num_kinds * num_places - 1)
        table_row = table_row.view(-1, group)

        # An embedding bag sums the table's rows of a group without storing them one by one.
        weights = None if importance is None else importance[: len(table_row)]
        costs = embedding_bag(
            table_row, table.view(-1, num_candidates), mode="sum", per_sample_weights=weights
        )  # (layers * rows * groups, candidates)
        best.append(_argmin_(costs).view(num_layers, -1, span.shape[2]))
    return torch.cat(best, 1).unbind()


def _importance_of_rows(searches: Sequence[_Search], num_rows: int) -> Tensor | None:
    """What an error costs in the columns of so many rows of each layer, by group, in units of the
    layer's most important column: (layers * rows * groups, group); None where all cost the same.
    """
    importances = [search.importance for search in searches if search.importance is not None]
    if not importances:
        return None
    importance = stack(importances)  # (layers, in)
    relative = importance / importance.amax(1, keepdim=True)
    return relative.unsqueeze(1).expand(-1, num_rows, -1).reshape(-1, searches[0].group)


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
