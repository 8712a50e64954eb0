"""One option of each unit, so that sizes add up to a limit at most and damages to as little as
possible.

The multiple-choice knapsack problem, solved exactly: partial choices that another beats in size and
damage are dropped (Sinha, Zoltners 1979), and those that cannot end better than a choice already
known, by Lagrange's bound.
"""

from __future__ import annotations

from collections.abc import Sequence

from attrs import frozen

# of halving an interval: beyond what a float holds
ROUNDS = 100

# of a damage: sums in another order may differ by it
SLACK = 1e-12


@frozen
class Option:
    """What one choice of a unit costs.

    Attributes:
        size: in bytes, or whatever the limit is in.
        damage: of any sign; damages of units add up.
    """

    size: int
    damage: float


def choose(units: Sequence[Sequence[Option]], limit: int) -> list[int]:
    """For every unit the number of its option.

    Raises:
        ValueError: even the smallest options are larger than the limit.
    """
    if sum(min(option.size for option in options) for options in units) > limit:
        raise ValueError(f"no choice has a size of at most {limit}")
    price, best = _price(units, limit)
    _fill(units, best, limit)
    known = sum(options[i].damage for options, i in zip(units, best, strict=True))
    # what units add to Lagrange's bound
    least = [min(o.damage + price * o.size for o in options) for options in units]
    room = [min(o.size for o in options) for options in units]
    after, small = sum(least) - price * limit, sum(room)
    partial: list[tuple[int, float, tuple[int, ...]]] = [(0, 0.0, ())]
    for options, bound, smallest in zip(units, least, room, strict=True):
        after, small = after - bound, small - smallest
        grown = sorted(
            (size + option.size, damage + option.damage, (*chosen, i))
            for size, damage, chosen in partial
            for i, option in enumerate(options)
        )
        partial, least_damage = [], float("inf")
        for size, damage, chosen in grown:
            fits, better = size + small <= limit, damage < least_damage
            if fits and better and damage + price * size + after <= known + SLACK * abs(known):
                partial.append((size, damage, chosen))
                least_damage = damage
    return list(min(partial, key=lambda p: p[1])[2]) if partial else best


def _fill(units: Sequence[Sequence[Option]], chosen: list[int], limit: int) -> None:
    """Change one unit's option after another, the one that saves most of what fits, until none
    does.
    """
    left = limit - sum(options[i].size for options, i in zip(units, chosen, strict=True))
    while True:
        swaps = (
            (options[now].damage - o.damage, unit, i)
            for unit, (options, now) in enumerate(zip(units, chosen, strict=True))
            for i, o in enumerate(options)
            if o.size - options[now].size <= left
        )
        saving, unit, option = max(swaps, default=(0.0, 0, 0))
        if saving <= 0:
            return
        left -= units[unit][option].size - units[unit][chosen[unit]].size
        chosen[unit] = option


def _price(units: Sequence[Sequence[Option]], limit: int) -> tuple[float, list[int]]:
    """The lowest price of a byte at which the options that are then best keep to the limit, and
    these options.
    """

    def at(price: float) -> list[int]:
        return [
            min(range(len(u)), key=lambda i: (u[i].damage + price * u[i].size, u[i].size))
            for u in units
        ]

    def fits(chosen: Sequence[int]) -> bool:
        return sum(options[i].size for options, i in zip(units, chosen, strict=True)) <= limit

    if fits(free := at(0.0)):
        return 0.0, free
    low, high = 0.0, 1.0
    while not fits(at(high)):
        high *= 2
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(at(middle)) else (middle, high)
    return high, at(high)
