"""Which weights are kept: the largest, those with the largest effect on the output, or those that
others can make up for least.

Of every `group_size` neighboring columns of every row exactly `num_kept` weights are kept; of equal
ones any may be.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bitpress import numerics

if TYPE_CHECKING:
    from torch import Tensor

# Columns of a wide group that SparseGPT decides on at a time.
SPAN = 64


def select_largest(score: Tensor, candidates: Tensor, num_kept: int, group_size: int) -> Tensor:
    """(out, in) bool: the largest scores of each group.

    Args:
        score: (out, in) float32, none below 0.
        candidates: (out, in) bool: weights that are not zero yet; others come last.
        num_kept: weights of a group that are kept.
        group_size: columns of a group.
    """
    import torch

    groups = score.masked_fill(~candidates, -1.0).view(len(score), -1, group_size)
    mask = torch.zeros_like(groups, dtype=torch.bool)
    # By position and not by threshold: of equal scores no more than so many are kept.
    return mask.scatter_(2, groups.topk(num_kept, 2).indices, True).view_as(score)


def fill(mask: Tensor, num_kept: int, group_size: int) -> Tensor:
    """(out, in) bool: the mask, and of the first other columns of each group as many as it lacks.

    Args:
        mask: (out, in) bool, True for at most `num_kept` columns of a group.
        num_kept: columns of a group that the result is True for.
        group_size: columns of a group.
    """
    import torch

    groups = mask.view(len(mask), -1, group_size)
    order = groups.to(torch.uint8).argsort(dim=2, descending=True, stable=True)
    filled = torch.zeros_like(groups)
    return filled.scatter_(2, order[..., :num_kept], True).view_as(mask)


def wanda(
    target: Tensor, diagonal: Tensor, candidates: Tensor, num_kept: int, group_size: int
) -> Tensor:
    """(out, in) bool: the largest |w_j| ||x_j|| of each group (Sun et al., "Wanda", arXiv
    2306.11695, equation 1).

    Args:
        target: (out, in) float32, w.
        diagonal: (in,) float32, E[x_j²].
        candidates: as for `select_largest`, like the arguments after it.
    """
    return select_largest(target.abs() * diagonal.sqrt(), candidates, num_kept, group_size)


def sparsegpt(
    target: Tensor, factor: numerics.Factor, candidates: Tensor, num_kept: int, group_size: int
) -> tuple[Tensor, Tensor]:
    """A mask, and the target swept onto it (Frantar & Alistarh, "SparseGPT", arXiv 2301.00774).

    Column by column a weight that is dropped is made up for by those that come after it. Which ones
    is decided when the sweep comes to them, by target_k² D_k: what dropping column k costs once
    later columns have made up for it (D_k is the paper's 1 / [H⁻¹]_kk). A group of four is decided
    as a whole; of a wide one, span by span, as many as Wanda would keep there: the paper keeps as
    many of each, which costs a tenth more.

    Args:
        target: (out, in) float32.
        factor: of H, its order leaves groups whole.
        candidates: as for `select_largest`, like the arguments after it.

    Returns:
        (out, in) bool, and (out, in) float32.
    """
    import torch

    wanda_mask = wanda(target, factor.diagonal, candidates, num_kept, group_size)
    # A sweep reads columns: transposed, they are contiguous.
    wanda_mask, candidates = wanda_mask.T.contiguous(), candidates.T.contiguous()  # (in, out)
    mask = torch.empty_like(candidates)

    def decide_span(best: Tensor, rows: slice, positions: slice) -> None:
        columns = factor.order[positions]
        cost = best.square() * factor.variance[positions].unsqueeze(1)  # (span, rows)
        cost.masked_fill_(~candidates[columns, rows], -1.0)
        rank = cost.argsort(dim=0, descending=True, stable=True).argsort(dim=0)
        mask[columns, rows] = rank < wanda_mask[columns, rows].sum(0)

    def project(column_target: Tensor, rows: slice, column: int) -> Tensor:
        return column_target * mask[column, rows]

    span = SPAN if group_size == len(candidates) else group_size
    swept, _ = numerics.column_sweep(target, factor, project, decide_span, span)
    return mask.T.contiguous(), swept
