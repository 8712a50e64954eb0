"""Which weights are kept: the largest, those that count most for the inputs seen, or those that the
others cannot make up for.

In every run of `group` columns of every row exactly `kept` weights are kept, ties going to any of
the equal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bitpress import numerics

if TYPE_CHECKING:
    from torch import Tensor

# columns of a wide group among which SparseGPT chooses at a time
SPAN = 64


def largest(score: Tensor, allowed: Tensor, kept: int, group: int) -> Tensor:
    """(out, in) bool: the best scores of each group, what is not allowed coming last.

    Args:
        score: (out, in) float32, none below 0.
        allowed: (out, in) bool.
    """
    grouped = score.masked_fill(~allowed, -1.0).view(len(score), -1, group)
    return _best(grouped, kept, 2).view_as(score)


def wanda(target: Tensor, diagonal: Tensor, allowed: Tensor, kept: int, group: int) -> Tensor:
    """(out, in) bool: the largest |w_j| ||x_j|| (Sun et al., "Wanda", arXiv 2306.11695, equation
    1).

    Args:
        diagonal: (in,) E[x_j²].
    """
    return largest(target.abs() * diagonal.sqrt(), allowed, kept, group)


def sparsegpt(
    target: Tensor, factored: numerics.Factor, allowed: Tensor, kept: int, group: int
) -> tuple[Tensor, Tensor]:
    """(out, in) bool, and the target swept onto it (Frantar & Alistarh, "SparseGPT", arXiv
    2301.00774).

    Column by column a weight that is dropped is made up for by those that come after it. Which ones
    is decided when the sweep comes to them, by target_k² D_k: what dropping column k costs once
    later columns have made up for it (D_k is the paper's 1 / [H⁻¹]_kk). A group of four is decided
    as a whole; of a wide one, span by span, as many as Wanda would keep there: the paper keeps as
    many of each, which costs a tenth more.

    Args:
        factored: its order leaves groups whole.
    """
    import torch

    share = wanda(target, factored.diagonal, allowed, kept, group).T.contiguous()  # (in, out)
    may = allowed.T.contiguous()
    keep = torch.empty_like(may)

    def choose(targets: Tensor, rows: slice, places: slice) -> None:
        columns = factored.order[places]
        cost = targets.square() * factored.variance[places].unsqueeze(1)  # (span, rows)
        rank = (
            cost.masked_fill_(~may[columns, rows], -1.0)
            .argsort(dim=0, descending=True, stable=True)
            .argsort(dim=0)
        )
        keep[columns, rows] = rank < share[columns, rows].sum(0)

    def project(column_target: Tensor, rows: slice, column: int) -> Tensor:
        return column_target * keep[column, rows]

    found, _ = numerics.column_sweep(
        target, factored, project, choose, SPAN if group == len(may) else group
    )
    return keep.T.contiguous(), found


def _best(score: Tensor, count: int, dim: int) -> Tensor:
    import torch

    return torch.zeros_like(score, dtype=torch.bool).scatter_(
        dim, score.topk(count, dim).indices, True
    )
