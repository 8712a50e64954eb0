"""Which weights are kept: the largest, those that count most for the inputs seen, or those that the others cannot make up for.

In every run of `group` columns of every row exactly `kept` weights are kept, ties going to any of the equal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bitpress import numerics

if TYPE_CHECKING:
    from torch import Tensor

SPAN = 128  # columns among which SparseGPT chooses at a time


def largest(score: Tensor, allowed: Tensor, kept: int, group: int) -> Tensor:
    """(out, in) bool: the best scores of each group, what is not allowed coming last.

    Args:
        score: (out, in) float32, none below 0.
        allowed: (out, in) bool.
    """
    grouped = score.masked_fill(~allowed, -1.0).view(len(score), -1, group)
    return _best(grouped, kept, 2).view_as(score)


def wanda(target: Tensor, diagonal: Tensor, allowed: Tensor, kept: int, group: int) -> Tensor:
    """(out, in) bool: the largest |w_j| ||x_j|| (Sun et al., "Wanda", arXiv 2306.11695, equation 1).

    Args:
        diagonal: (in,) E[x_j²].
    """
    return largest(target.abs() * diagonal.sqrt(), allowed, kept, group)


def sparsegpt(target: Tensor, factored: numerics.Factor, allowed: Tensor, kept: int, group: int) -> tuple[Tensor, Tensor]:
    """(out, in) bool, and the target swept onto it (Frantar & Alistarh, "SparseGPT", arXiv 2301.00774).

    Column by column a weight that is dropped is made up for by those that come after it. A choice is made when the sweep comes to
    it, by target_k² D_k: what dropping column k costs after later columns have made up for it. D_k is the paper's 1 / [H⁻¹]_kk.
    A wide group is cut into spans, each of which keeps its part.

    Args:
        factored: its order leaves groups (spans of wide ones) whole.
    """
    import torch

    may, keep = allowed.T.contiguous(), torch.empty_like(target, dtype=torch.bool).T.contiguous()  # (in, out)
    span = SPAN if group == len(may) else group

    def choose(targets: Tensor, rows: slice, places: slice) -> None:
        columns = factored.order[places]
        cost = targets.square() * factored.variance[places].unsqueeze(1)  # (span, rows)
        part = kept * (places.stop % group or group) // group - kept * (places.start % group) // group
        keep[columns, rows] = _best(cost.masked_fill_(~may[columns, rows], -1.0), part, 0)

    def project(column_target: Tensor, rows: slice, column: int) -> Tensor:
        return column_target * keep[column, rows]

    found, _ = numerics.sweep(target, factored, project, choose, span)
    return keep.T.contiguous(), found


def _best(score: Tensor, count: int, dim: int) -> Tensor:
    import torch

    return torch.zeros_like(score, dtype=torch.bool).scatter_(dim, score.topk(count, dim).indices, True)
