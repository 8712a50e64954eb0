"""Factors that a run folds into tensors of its source, as the manifest names them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from bitpress.errors import CheckpointError

# Exponents of two, by the axis ("columns", "rows") that they multiply, in the order in which they
# were multiplied.
Rescaled = Mapping[str, Sequence[float]]


def rescale(tensor: Tensor, rescaled: Rescaled, first_row: int = 0) -> Tensor:
    """A tensor after its columns and rows were multiplied: the same numbers on every device.

    Args:
        tensor: rows of a tensor of the source, (rows, ...).
        rescaled: of the whole tensor.
        first_row: where these rows begin in it.

    Returns:
        Of the same shape and dtype; each axis' products are taken in float32 and rounded to the
        dtype.

    Raises:
        CheckpointError: there are not as many exponents as the tensor has columns or rows.
    """
    for axis, exponents in rescaled.items():
        # Devices may differ in the last bit of float64; of no multiple of an eighth is 2^x so near
        # the middle of two float32 numbers that these would differ.
        factors = torch.tensor(exponents, dtype=torch.float64).exp2().float().to(tensor.device)
        if axis == "rows":
            factors = factors[first_row : first_row + len(tensor)]
        num_factors = {"columns": tensor.shape[-1], "rows": len(tensor)}.get(axis)
        if len(factors) != num_factors:
            raise CheckpointError(
                f"bitpress.json rescales its {axis} by {len(exponents)} exponents, not as many as "
                "it has: bitpress.json is damaged; compress again"
            )
        if axis == "rows":
            factors = factors.reshape(-1, *[1] * (tensor.ndim - 1))
        tensor = (tensor.float() * factors).to(tensor.dtype)
    return tensor
