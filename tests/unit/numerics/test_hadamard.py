"""The matrices by which hidden states and heads are rotated."""

from __future__ import annotations

import math

import pytest
import torch

from bitpress.numerics.hadamard import Rotation, rotate_columns, rotate_rows


def matrix(rotation: Rotation) -> torch.Tensor:
    return rotate_columns(torch.eye(rotation.period, dtype=torch.float64), rotation)


@pytest.mark.parametrize("period", [1, 2, 7, 64, 96, 384, 576, 2048])
def test_a_rotation_is_orthogonal(period: int) -> None:
    rotation = matrix(Rotation(period))
    identity = torch.eye(period, dtype=torch.float64)
    assert (rotation @ rotation.T - identity).abs().max() < 1e-12


def test_it_is_made_of_signs_and_hadamard_matrices() -> None:
    rotation = Rotation(24)
    assert rotation.block == 8
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    block = torch.kron(two, torch.kron(two, two))
    signs = rotation.factors().sign()
    expected = signs.diag() @ torch.block_diag(block, block, block) / math.sqrt(8)
    assert torch.allclose(matrix(rotation), expected, atol=1e-15)
    assert -12 < signs.sum() < 12


def test_rows_are_rotated_by_its_transpose() -> None:
    rotation = Rotation(48)
    weight = torch.randn(48, 5, dtype=torch.float64)
    assert torch.allclose(rotate_rows(weight, rotation), matrix(rotation).T @ weight, atol=1e-14)


def test_every_period_of_channels_is_rotated_alike() -> None:
    rotation = Rotation(16)
    weight = torch.randn(3, 64, dtype=torch.float64)
    expected = [part @ matrix(rotation) for part in weight.split(16, dim=1)]
    assert torch.allclose(rotate_columns(weight, rotation), torch.cat(expected, 1), atol=1e-14)


def test_the_result_is_the_same_to_the_bit_whatever_is_rotated_with_it() -> None:
    rotation = Rotation(96)
    weight = torch.randn(40, 96, dtype=torch.float64)
    parts = [rotate_columns(part, rotation) for part in weight.split(7)]
    assert torch.equal(rotate_columns(weight, rotation), torch.cat(parts))


def test_signs_are_the_same_in_every_release() -> None:
    # verify rotates the source again, maybe years later
    signs = "".join("+" if factor > 0 else "-" for factor in Rotation(16).factors())
    assert signs == "++++-+-++++--++-"
