"""One choice for each of many, the least harm in all within a budget: the multiple-choice knapsack."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MOST = 1 << 14  # partial choices that are kept; up to so many the best is found exactly


def choose(sizes: Sequence[Sequence[int]], harms: Sequence[Sequence[float]], budget: int) -> list[int] | None:
    """The place of each one's choice, with the least sum of harms among those whose sizes add up to the budget at most.

    Partial choices are extended one by one; of two, that which is larger and harms more is dropped (Kellerer, Pferschy and
    Pisinger, "Knapsack problems", 2004, section 11.5). Where more than `MOST` are left they are thinned evenly.

    Returns:
        None where even the smallest choices are larger than the budget.
    """
    left = [0] * (len(sizes) + 1)  # what the smallest choices from here on take
    for i in range(len(sizes) - 1, -1, -1):
        left[i] = left[i + 1] + min(sizes[i])
    if left[0] > budget:
        return None
    size, harm = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
    trail: list[tuple[Tensor, int]] = []
    for i, (own, costs) in enumerate(zip(sizes, harms, strict=True)):
        sums = (size.unsqueeze(1) + torch.tensor(own)).flatten()  # (partial choices · own choices,)
        costing = (harm.unsqueeze(1) + torch.tensor(costs, dtype=torch.float64)).flatten()
        order = costing.argsort(stable=True)
        order = order[sums[order].argsort(stable=True)]  # by size, of one size the least harm first
        order = order[sums[order] + left[i + 1] <= budget]
        least = costing[order].cummin(0).values
        better = torch.ones_like(order, dtype=torch.bool)
        better[1:] = costing[order][1:] < least[:-1]
        order = order[better]
        if len(order) > MOST:
            order = order[torch.linspace(0, len(order) - 1, MOST).long()]
        size, harm = sums[order], costing[order]
        trail.append((order, len(own)))
    place, found = len(size) - 1, []  # the largest that is left harms least
    for order, count in reversed(trail):
        place, choice = divmod(int(order[place]), count)
        found.append(choice)
    return found[::-1]
