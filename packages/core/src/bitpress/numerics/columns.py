"""One sweep over the columns of a weight for every method that feeds errors forward: GPTQ,
SparseGPT and their kin.

Columns are decided one after the other, each as near as its own format allows to a target that
makes up for the errors of the columns before it:

    target_k = w_k + Σ_{j<k} (w_j - q_j) U_jk        q_k = project(target_k)        loss = Σ_k D_k
    (target_k - q_k)²

With H = U D Uᵀ this is GPTQ (Frantar et al., arXiv 2210.17323) in the form of Chee et al. (QuIP,
arXiv 2307.13304, theorem 6): no inverse is needed. Only blocks of `LEAF` columns are swept one by
one; between blocks the feedback is a matrix product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bitpress.numerics.hessian import Factor

# columns swept one by one
LEAF = 16

# rows swept together: a leaf's columns of them stay in cache
ROWS = 2048

Project = Callable[[Tensor, slice, int], Tensor]

Ahead = Callable[[Tensor, slice, slice], None]


def column_sweep(
    weight: Tensor, factor: Factor, project: Project, ahead: Ahead | None = None, span: int = LEAF
) -> tuple[Tensor, Tensor]:
    """The projected weight, and what it costs each row.

    Args:
        weight: (out, in) float32; its rows are independent.
        project: given the targets (rows,) of one column, which rows they are, and which column,
            returns what they become.
        ahead: for choices between columns: before each `span` of them it is given what would be
            best for them (span, rows) if they and all that follow could be any number, which rows
            they are, and the columns' places in the factor's order.
        span: a divisor or a multiple of `LEAF`.

    Returns:
        (out, in) float32, and (out,) float32: (w - q) H (w - q)ᵀ of each row.
    """
    found, losses = torch.empty_like(weight), []
    for first in range(0, len(weight), ROWS):
        rows = slice(first, min(first + ROWS, len(weight)))
        found[rows], loss = _sweep_rows(weight[rows], rows, factor, project, ahead, span)
        losses.append(loss)
    return found, torch.cat(losses)


def _sweep_rows(
    weight: Tensor, rows: slice, factor: Factor, project: Project, ahead: Ahead | None, span: int
) -> tuple[Tensor, Tensor]:
    source = weight.T.contiguous().index_select(
        0, factor.order
    )  # (in, rows): a column is contiguous
    target, error, chosen = source.clone(), torch.empty_like(source), torch.empty_like(source)
    columns, loss = factor.order.tolist(), weight.new_zeros(len(weight))
    given, wanted, missed, made = (tensor.unbind() for tensor in (source, target, error, chosen))

    # no product ends inside a span
    whole = max(span, LEAF) if ahead else LEAF
    for lo, middle, hi in _steps(0, len(columns), whole):
        if middle < hi:
            target[middle:hi].addmm_(factor.unit[lo:middle, middle:hi].T, error[lo:middle])
            continue
        for k in range(lo, hi):
            if ahead and k % span == 0:
                places = slice(k, min(k + span, len(columns)))
                missing, unit = source[places] - target[places], factor.unit[places, places].T
                missing = torch.linalg.solve_triangular(
                    unit, missing, upper=False, unitriangular=True
                )
                ahead(source[places] - missing, rows, places)
            made[k].copy_(project(wanted[k], rows, columns[k]))
            torch.sub(given[k], made[k], out=missed[k])
            target[k + 1 : hi].addr_(factor.unit[k, k + 1 : hi], missed[k])
        loss += factor.variance[lo:hi] @ (target[lo:hi] - chosen[lo:hi]).square_()
    return torch.empty_like(chosen).index_copy_(0, factor.order, chosen).T, loss


def _steps(lo: int, hi: int, whole: int) -> Iterator[tuple[int, int, int]]:
    """What is done to columns lo to hi: (lo, hi, hi) decides them, (lo, middle, hi) feeds the first
    to those from middle on.
    """
    if hi - lo <= LEAF:
        yield lo, hi, hi
        return
    unit = whole if hi - lo > whole else LEAF
    middle = lo + unit * ((hi - lo + unit) // (2 * unit))
    yield from _steps(lo, middle, whole)
    yield lo, middle, hi
    yield from _steps(middle, hi, whole)
