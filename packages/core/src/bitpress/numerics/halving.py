"""In which order columns are decided one by one, and their errors fed to those after them."""

from __future__ import annotations

from collections.abc import Iterator


def halve(start: int, stop: int, unit: int, leaf: int) -> Iterator[tuple[int, int, int]]:
    """The steps of a sweep over columns start to stop, halved again and again.

    (start, stop, stop) decides these columns, at most `leaf`; (start, middle, stop) feeds the
    errors of the first ones to those from middle on. A longer run is divided at the greatest power
    of two times `unit`, so that steps of as many columns are at equal distances.
    """
    if stop - start <= leaf:
        yield start, stop, stop
        return
    multiple = unit if stop - start > unit else leaf
    num_multiples = -(-(stop - start) // multiple)
    middle = start + (multiple << (num_multiples - 1).bit_length() - 1)
    yield from halve(start, middle, unit, leaf)
    yield start, middle, stop
    yield from halve(middle, stop, unit, leaf)
