"""Weights of which six in eight neighbors are not zero, in windows of which two in four are."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given, settings, strategies as st

from bitpress_vllm_sparse import windows

CPU = torch.device("cpu")


def make_weight(num_rows: int, num_groups: int, num_kept: int, seed: int) -> torch.Tensor:
    """(rows, 8 · groups) float32 integers: so many of every eight, at random places, are not 0."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(num_rows, num_groups, 8, generator=generator).argsort(2)
    numbers = torch.randint(1, 100, order.shape, generator=generator).float()
    return (numbers * (order < num_kept)).flatten(1)


def test_six_weights_of_eight_fit_wherever_they_are() -> None:
    masks = [places for places in itertools.product((0, 1), repeat=8) if sum(places) <= 6]
    weight = torch.tensor(masks) * torch.arange(1, 9)
    spread = windows.spread(weight, weight != 0)
    assert spread.shape == (len(masks), 12)
    assert ((spread != 0).view(-1, 3, 4).sum(2) <= 2).all()
    # each weight stands once, in a column that was its own
    columns = windows.window_columns(8, CPU)
    for row, original in zip(spread.tolist(), weight.tolist(), strict=True):
        found = [0] * 8
        for value, column in zip(row, columns.tolist(), strict=True):
            assert value in {0, original[column]}
            found[column] += value
        assert found == original


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.integers(1, 20), st.integers(1, 10), st.integers(0, 6), st.integers(0, 1000))
def test_products_with_repeated_inputs_are_the_same(
    num_rows: int, num_groups: int, num_kept: int, seed: int
) -> None:
    weight = make_weight(num_rows, num_groups, num_kept, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    inputs = torch.randint(-9, 9, (5, weight.shape[1]), generator=generator).float()
    columns = windows.window_columns(weight.shape[1], CPU)
    spread = windows.spread(weight, weight != 0)
    # whole numbers: sums are exact in any order
    assert torch.equal(inputs[:, columns] @ spread.T, inputs @ weight.T)


def test_what_keeps_a_pattern_is_told_from_what_does_not() -> None:
    weight = make_weight(4, 4, 6, 0)
    assert windows.keeps(weight != 0, 6, 8)
    assert not windows.keeps(weight != 0, 5, 8)
    assert not windows.keeps(weight != 0, 2, 4)
    # a width that has no whole groups keeps nothing
    assert not windows.keeps((weight != 0)[:, :12], 6, 8)
