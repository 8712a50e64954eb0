"""Scales fitted anew to the codes that error feedback has chosen.

A grid's scales are chosen before its codes, for weights that are rounded to nearest. Once codes are
there, what is best for them is a problem of least squares, one number for each group.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from attrs import frozen
from torch import Tensor

from bitpress.numerics import kernel_trial
from bitpress.numerics.rounding_rule import RoundingRule, RuledGrid
from bitpress.numerics.scale_search import to_groups

# Codes of so many bits and more are not fitted: their steps are so small that it gains nothing.
FINE_BITS = 8

# Columns of a group that a kernel fits a scale to; wider groups are few.
WIDEST_FUSED_GROUP = 256


def count_passes(bits: float | None) -> int:
    """How often rows are rounded to codes of so many bits: again where scales are fitted to the
    first ones; None: there are no codes.
    """
    return 2 if bits is not None and bits < FINE_BITS else 1


@runtime_checkable
class ScaledGrid(Protocol):
    """A grid whose numbers are units times a scale, one for each group of columns of a row.

    Attributes:
        scale: (out, groups) float32, as it will be stored; fitting writes into it.
        refits: whether scales are to be fitted.
    """

    scale: Tensor

    @property
    def refits(self) -> bool: ...

    def nearest_scale(self, scale: Tensor) -> Tensor:
        """The nearest scales that can be stored: (rows,) float32 -> (rows,) float32."""
        ...


@frozen(eq=False)
class DampedHessian:
    """H as what an error costs.

    Attributes:
        moment: (in, in) float32, the sum of x xᵀ over tokens.
        damping: (in,) float32, what is added to its diagonal.
    """

    moment: Tensor
    damping: Tensor

    def multiply(self, left: Tensor, first: int = 0) -> Tensor:
        """The product with as many rows of H as `left` has columns, in the columns from theirs on.

        Args:
            left: (rows, columns) float32.
            first: row of H.

        Returns:
            (rows, in - first) float32.
        """
        num_columns = left.shape[1]
        columns = slice(first, first + num_columns)
        product = left @ self.moment[columns, first:]
        product[:, :num_columns].addcmul_(left, self.damping[columns])
        return product


def refit_scales(
    target: Tensor, rounded: Tensor, hessian: DampedHessian, grid: ScaledGrid, rows: slice
) -> Tensor:
    """Scales with which the codes of some rows cost less, (target - q) H (target - q)ᵀ.

    Group after group takes the scale that is best beside those of all others, or keeps its own
    where no other that can be stored is better: no row gets worse.

    Args:
        target: (rows, in) float32.
        rounded: (rows, in) float32, representable numbers.
        hessian: H.
        grid: on which they are representable.
        rows: which rows of the grid they are.

    Returns:
        (rows, groups) float32.
    """
    scale = grid.scale[rows].clone()  # (rows, groups)
    size = target.shape[1] // scale.shape[1]
    units = to_groups(rounded, size) / scale.unsqueeze(2)  # (rows, groups, group)
    # Half the negative gradient of the cost.
    residual = hessian.multiply(target - rounded)  # (rows, in)

    if isinstance(grid, RuledGrid) and _can_fuse(grid.rounding_rule, target.device):
        from bitpress.numerics import fused_refit

        return fused_refit.refit_groups(units, residual, hessian, grid.rounding_rule.of_rows(rows))

    for group in range(scale.shape[1]):
        first, group_units = group * size, units[:, group]
        # no scale before this group's is asked for again
        later_residual = residual[:, first:]
        product = hessian.multiply(group_units, first)
        slope = (later_residual[:, :size] * group_units).sum(1)  # (rows,)
        curvature = (product[:, :size] * group_units).sum(1)

        own = scale[:, group]
        best = grid.nearest_scale(own + torch.where(curvature > 0, slope / curvature, 0.0))
        change = best - own
        is_better = change * (2 * slope - change * curvature) > 0
        change = torch.where(is_better, change, 0.0)
        later_residual.addcmul_(change.unsqueeze(1), product, value=-1)
        # not by adding the change, which rounds
        scale[:, group] = torch.where(is_better, best, own)
    return scale


def _can_fuse(rule: RoundingRule, device: torch.device) -> bool:
    is_possible = rule.stored_scales is not None and rule.group <= WIDEST_FUSED_GROUP
    return is_possible and kernel_trial.can_fuse(device)
