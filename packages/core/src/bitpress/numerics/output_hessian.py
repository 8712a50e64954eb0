"""What an error in each of a layer's outputs costs the model, and how rows make up for each other's
errors.

GPTQ takes all outputs to be equally important and unrelated. Here the Hessian of the model's KL
divergence is taken to be H_O ⊗ H_I: H_I = E[x xᵀ] of the layer's inputs, and H_O = E[g gᵀ] of the
gradients of the loss with respect to its outputs, where labels are drawn from the model's own
predictions, so that this is its Fisher information. Source: Tseng et al., "Model-Preserving
Adaptive Rounding" (YAQA), arXiv 2505.22988.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from attrs import frozen
from torch import Tensor
from torch.nn.functional import pad

from bitpress.numerics.exact import scalar_like
from bitpress.numerics.gram import gram, product_dtype
from bitpress.runtime.batching import batched, read_number, stack
from bitpress.runtime.lanes import offered_lanes
from bitpress.schemes.values import Statistic

# Rows that make up for each other's errors: H_O is kept in blocks of so many rows, along its
# diagonal.
ROW_BLOCK = 512

# Rows are decided in so many groups, the more of them the more tokens H_O is known from. Those of a
# group do not make up for each other, so that they are swept side by side: of the pairs of rows one
# in 16 is left out, or one in 32.
FEW_ROW_GROUPS, MANY_ROW_GROUPS = 16, 32
MANY_TOKENS = 32768

# What is added to the diagonal of H_O, in units of its mean, beside the share that rows of a block
# have of the tokens: what so few tokens seem to say of so many rows is chance.
DAMPING = 0.1


def output_statistics(output_gradient: Tensor) -> dict[str, Statistic]:
    """The sums over one batch from which rows make up for each other's errors; call it from
    `observe`.

    Args:
        output_gradient: (tokens, out) floating, g.

    Returns:
        "output_hessian": (out, block) float32, of each row Σ g gᵀ with the rows of its block; and
        "gradient_tokens", the number of tokens.
    """
    gradient = output_gradient.to(product_dtype(output_gradient))
    num_rows = gradient.shape[1]
    block = block_size(num_rows)
    hessian = gradient.new_zeros(num_rows, block, dtype=torch.float32)
    for first in range(0, num_rows, block):
        rows = slice(first, min(first + block, num_rows))
        hessian[rows, : rows.stop - first] = gram(gradient[:, rows].contiguous())
    return {
        "output_hessian": Statistic(hessian, "sum", rows=True),
        "gradient_tokens": Statistic(torch.tensor(float(len(gradient))), "sum"),
    }


def block_size(num_rows: int) -> int:
    """Rows of a block of H_O: a multiple of any number of groups."""
    return min(ROW_BLOCK, -(-num_rows // MANY_ROW_GROUPS) * MANY_ROW_GROUPS)


def count_row_groups(num_tokens: float) -> int:
    """In how many groups rows are decided, whose gradients are known from so many tokens."""
    return MANY_ROW_GROUPS if num_tokens >= MANY_TOKENS else FEW_ROW_GROUPS


@frozen(eq=False)
class RowFactor:
    """How the errors of rows move the targets of rows that are decided after them.

    Row i belongs to group i % `num_groups`. With H_O = R Rᵀ, R upper triangular in the order of the
    groups, the errors E₁ of earlier rows cost least once those of the next group are
    -R₂₂⁻ᵀ R₁₂ᵀ E₁.

    Attributes:
        coupling: (blocks, block, block) float32, rows and columns in the order of the groups: what
            each row's target loses for the errors of the rows before its group.
        num_groups: of the rows of a block.
    """

    coupling: Tensor
    num_groups: int

    @property
    def block(self) -> int:
        """Rows of a block."""
        return self.coupling.shape[1]

    def of_rows(self, rows: slice) -> RowFactor:
        """The factor of some rows, from the first of a block on."""
        blocks = slice(rows.start // self.block, -(-rows.stop // self.block))
        return RowFactor(self.coupling[blocks], self.num_groups)

    def move(self, weight: Tensor, decided: Tensor) -> Tensor:
        """What rows (rows, in) should have become, given what became of the rows before them."""
        moved, block, step = weight.clone(), self.block, self.block // self.num_groups
        errors = torch.split(decided - weight, block)
        for coupling, own, error in zip(
            self.coupling, torch.split(moved, block), errors, strict=True
        ):
            # rows in the order of the groups, and back
            padded = pad(error, (0, 0, 0, block - len(error)))
            grouped = padded.view(step, self.num_groups, -1).transpose(0, 1).reshape(block, -1)
            shift = (coupling @ grouped).view(self.num_groups, step, -1).transpose(0, 1)
            own -= shift.reshape(block, -1)[: len(own)]
        return moved


def damped_output_hessian(stats: Mapping[str, Statistic]) -> Tensor | None:
    """The damped H_O, in blocks whose mean diagonal is near 1: (blocks, block, block) float64; None
    where there are no statistics of gradients, or they are not finite.

    Args:
        stats: what `output_statistics` returned, merged over batches.
    """
    if "output_hessian" not in stats:
        return None
    hessian = stats["output_hessian"].value  # (out, block)
    if not read_number(hessian.sum().isfinite()):
        return None
    return _damp([hessian], [max(read_number(stats["gradient_tokens"].value), 1.0)])


def _damp(hessians: Sequence[Tensor], num_tokens: Sequence[float]) -> Tensor:
    """The damped H_O of layers, one after the other, as `damped_output_hessian` gives one.

    Args:
        hessians: (out, block) float32 of each.
        num_tokens: that each is known from.
    """
    num_rows, block = hessians[0].shape
    num_blocks = -(-num_rows // block)
    # rows of the last block that there are not are unrelated to all others
    padded = hessians[0].new_zeros(len(hessians), num_blocks * block, block, dtype=torch.float64)
    for own, hessian in zip(padded, hessians, strict=True):
        own[:num_rows] = hessian
    blocks = padded.view(-1, block, block)

    diagonal = blocks.diagonal(dim1=1, dim2=2)  # (blocks, block)
    mean = diagonal.sum(1) / (diagonal > 0).sum(1).clamp_(min=1)
    blocks.div_(mean.masked_fill_(mean == 0, 1.0).view(-1, 1, 1))
    damping = stack([scalar_like(diagonal, DAMPING + block / own) for own in num_tokens])
    diagonal.add_(damping.repeat_interleave(num_blocks).unsqueeze(1))
    return blocks


def factorize_output_hessian(stats: Mapping[str, Statistic]) -> RowFactor | None:
    """The factor of the damped H_O; None where there are no statistics of gradients, or they are
    not finite, or relate no rows. Those of layers that are solved side by side are computed
    together.

    Args:
        stats: what `output_statistics` returned, merged over batches.
    """
    if "output_hessian" not in stats:
        return None
    hessian = stats["output_hessian"].value  # (out, block)
    num_tokens = max(read_number(stats["gradient_tokens"].value), 1.0)
    num_groups = count_row_groups(num_tokens)
    form = hessian.shape, hessian.device, num_groups
    coupling = batched(_couple_rows, (hessian, num_tokens), form)
    return None if coupling is None else RowFactor(coupling, num_groups)


def _couple_rows(layers: Sequence[tuple[Tensor, float]]) -> list[Tensor | None]:
    """The coupling of each layer's rows, as a `RowFactor` has it; None where there is none.

    Args:
        layers: H_O of each, (out, block) float32, and from how many tokens it is known.
    """
    hessians, num_tokens = zip(*layers, strict=True)
    num_groups = count_row_groups(num_tokens[0])
    blocks = _damp(hessians, num_tokens)
    lanes = offered_lanes()
    pieces = blocks.tensor_split(min(lanes.num_lanes, len(blocks)))
    solved = list(lanes.map(lambda piece: _couple_blocks(piece, num_groups), pieces))
    coupling, is_factored = (torch.cat(of_pieces) for of_pieces in zip(*solved, strict=True))

    coupling = coupling.view(len(layers), -1, *coupling.shape[1:])
    has_all = is_factored.view(len(layers), -1).all(1)
    is_coupled = (has_all & coupling.flatten(1).any(1)).tolist()
    return [own if has_any else None for own, has_any in zip(coupling, is_coupled, strict=True)]


def _couple_blocks(blocks: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """The coupling of each block of the damped H_O, (blocks, block, block) float32, and whether it
    is finite and has a factor, (blocks,) bool.
    """
    block, step = blocks.shape[1], blocks.shape[1] // num_groups
    order = torch.arange(block, device=blocks.device).view(-1, num_groups).T.reshape(-1)
    lower, info = torch.linalg.cholesky_ex(blocks[:, order][:, :, order].flip(1, 2))

    root = lower.flip(1, 2)  # upper triangular
    coupling = torch.zeros_like(root)
    for first in range(step, block, step):
        rows = slice(first, first + step)
        coupling[:, rows, :first] = torch.linalg.solve_triangular(
            root[:, rows, rows].mT, root[:, :first, rows].mT, upper=False
        )
    coupling = coupling.float()
    return coupling, coupling.flatten(1).sum(1).isfinite() & (info == 0)
