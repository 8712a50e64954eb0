"""Weights of which 6 in 8 neighbors are not zero, as twelve columns of which 2 in 4 are.

Three windows of four columns cover eight, and overlap by two. Each weight goes to the first window
that has room for it; six always fit (SlideSparse, arXiv 2603.05232). A product then takes the
inputs of the overlaps twice: 12 columns at half the work are 3/4 of 8.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitpress_sparse.bitmask import as_integers

# Columns of a group, of a window, and from one window to the next.
GROUP, WINDOW, STEP = 8, 4, 2
STARTS = range(0, GROUP - WINDOW + 1, STEP)
KEPT = 2


def keeps(is_nonzero: Tensor, num_kept: int, group_size: int) -> bool:
    """Whether at most `num_kept` of every `group_size` neighbors in (out, in) bool are True."""
    if is_nonzero.shape[1] % group_size:
        return False
    groups = is_nonzero.view(len(is_nonzero), -1, group_size)
    return bool((groups.sum(2) <= num_kept).all())


def window_columns(width: int, device: torch.device) -> Tensor:
    """(width · 3 / 2,) int64: the column that each column of the windows was."""
    columns = torch.arange(width, device=device).view(-1, GROUP)
    return torch.cat([columns[:, start : start + WINDOW] for start in STARTS], 1).flatten()


def repeat_inputs(inputs: Tensor, columns: Tensor) -> Tensor:
    """(tokens, in · 3 / 2): inputs (tokens, in), for each column of the windows its own."""
    return as_integers(inputs).index_select(1, columns).view(inputs.dtype)


def spread(weight: Tensor, is_nonzero: Tensor) -> Tensor:
    """(out, in · 3 / 2): the weights in their windows, of whose columns 2 in 4 are not zero.

    Args:
        weight: (out, in).
        is_nonzero: (out, in) bool, at most six of every eight neighbors.
    """
    groups = as_integers(weight).view(len(weight), -1, GROUP)
    left = is_nonzero.view_as(groups).clone()
    windows = []
    for start in STARTS:
        columns = slice(start, start + WINDOW)
        taken = left[..., columns] & (left[..., columns].cumsum(2) <= KEPT)
        left[..., columns] &= ~taken
        windows.append(groups[..., columns] * taken)
    return torch.cat(windows, 2).flatten(1).view(weight.dtype)
