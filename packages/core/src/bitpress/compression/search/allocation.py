"""One option of each unit, so that sizes add up to a limit at most and costs to as little as
possible: the multiple-choice knapsack problem.

With c[u, i] the cost and s[u, i] the size of option i of unit u, and C the limit, the choice i(u)
is sought that

    minimizes Σ_u c[u, i(u)]  such that  Σ_u s[u, i(u)] <= C.

It is solved exactly, unit by unit, from the partial choices of the units before. Partial choices
that another beats in size and cost are dropped (Sinha and Zoltners, "The Multiple-Choice Knapsack
Problem", Operations Research 27, 1979), and those that cannot end better than a choice that is
known already. How well one can end, Lagrange's relaxation bounds: for every price λ >= 0 of a unit
of size

    Σ_u min_i (c[u, i] + λ s[u, i]) - λ C  <=  Σ_u c[u, i(u)]  for every choice that keeps to C.
"""

from __future__ import annotations

from collections.abc import Sequence

from attrs import frozen

# Times that the interval of the price is halved: beyond what a float holds.
NUM_BISECTIONS = 100

# Relative tolerance of a cost: sums in another order may differ by that much.
TOLERANCE = 1e-12


@frozen
class Option:
    """What one choice for a unit takes.

    Attributes:
        size: in bytes, or whatever the limit is in.
        cost: of any sign; costs of units add up.
    """

    size: int
    cost: float


# The options of every unit.
Units = Sequence[Sequence[Option]]


def choose_options(units: Units, limit: int) -> list[int]:
    """For every unit the number of its option.

    Raises:
        ValueError: even the smallest options are larger than the limit.
    """
    if sum(min(option.size for option in options) for options in units) > limit:
        raise ValueError(f"no choice has a size of at most {limit}")

    # a choice that keeps to the limit, not far from the best one
    price, choice = _find_price(units, limit)
    _improve(units, choice, limit)
    upper_bound = sum(options[i].cost for options, i in zip(units, choice, strict=True))
    upper_bound += TOLERANCE * abs(upper_bound)

    # what each unit adds to the bound, min_i (c + λ s), and takes at least
    bounds = [min(option.cost + price * option.size for option in options) for options in units]
    smallest = [min(option.size for option in options) for options in units]
    # the same of the units that are still to come; -λ C stands in the first from the start
    remaining_bound, remaining_size = sum(bounds) - price * limit, sum(smallest)

    partial: list[tuple[int, float, tuple[int, ...]]] = [(0, 0.0, ())]
    for options, bound, size_at_least in zip(units, bounds, smallest, strict=True):
        remaining_bound -= bound
        remaining_size -= size_at_least
        extended = sorted(
            (size + option.size, cost + option.cost, (*chosen, i))
            for size, cost, chosen in partial
            for i, option in enumerate(options)
        )

        # by growing size: one that costs no less than a smaller one is beaten by it
        partial, least_cost = [], float("inf")
        for size, cost, chosen in extended:
            is_feasible = size + remaining_size <= limit
            is_promising = cost + price * size + remaining_bound <= upper_bound
            if is_feasible and cost < least_cost and is_promising:
                partial.append((size, cost, chosen))
                least_cost = cost
    if not partial:
        return choice
    _, _, best = min(partial, key=lambda candidate: candidate[1])
    return list(best)


def _find_price(units: Units, limit: int) -> tuple[float, list[int]]:
    """The lowest price λ at which the options of least c + λ s keep to the limit, and these
    options.
    """

    def cheapest(price: float) -> list[int]:
        choice = []
        for options in units:
            prices = [(option.cost + price * option.size, option.size) for option in options]
            choice.append(min(range(len(options)), key=prices.__getitem__))
        return choice

    def is_feasible(choice: Sequence[int]) -> bool:
        return sum(options[i].size for options, i in zip(units, choice, strict=True)) <= limit

    if is_feasible(choice := cheapest(0.0)):
        return 0.0, choice
    low, high = 0.0, 1.0
    while not is_feasible(cheapest(high)):
        high *= 2
    for _ in range(NUM_BISECTIONS):
        middle = (low + high) / 2
        if is_feasible(cheapest(middle)):
            high = middle
        else:
            low = middle
    return high, cheapest(high)


def _improve(units: Units, choice: list[int], limit: int) -> None:
    """Change one unit's option after another, each time the one that saves most of what fits, until
    none saves anything.
    """
    free = limit - sum(options[i].size for options, i in zip(units, choice, strict=True))
    while True:
        swaps = (
            (options[current].cost - option.cost, unit, i)
            for unit, (options, current) in enumerate(zip(units, choice, strict=True))
            for i, option in enumerate(options)
            if option.size - options[current].size <= free
        )
        saving, unit, i = max(swaps, default=(0.0, 0, 0))
        if saving <= 0:
            return
        free -= units[unit][i].size - units[unit][choice[unit]].size
        choice[unit] = i
