"""The scale of each group of weights, the one of several candidates that costs the group least."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

CHUNK = 1 << 17  # weights whose candidates are compared at a time: they stay in cache

Parts = tuple[Tensor, ...]  # (out, groups) each; the first is the scale
Candidates = Callable[[Tensor], Iterator[Parts]]
Nearest = Callable[..., Tensor]


def search(weight: Tensor, importance: Tensor | None, group: int, candidates: Candidates, nearest: Nearest) -> Parts:
    """The candidate of every group with the least Σ importance (w - q)²; of equals the first.

    Args:
        weight: (out, in) float32, the width a multiple of `group`.
        importance: (in,) what an error costs in each column; None where all cost the same.
        candidates: given weights (out, groups, group), yields what is tried.
        nearest: given weights and a candidate's parts (out, groups, 1), the representable numbers nearest to them. Weights and
            scale come multiplied by one power of two.
    """
    costs = None if importance is None else importance.view(-1, group)
    chunks = torch.split(weight, max(CHUNK // weight.shape[1], 1))
    found = [_best(grouped(chunk, group), costs, candidates, nearest) for chunk in chunks]
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


def grouped(x: Tensor, group: int) -> Tensor:
    """(out, in) -> (out, groups, group)."""
    return x.reshape(len(x), -1, group)


def _best(weight: Tensor, importance: Tensor | None, candidates: Candidates, nearest: Nearest) -> Parts:
    """Judged near 1, where no square is too large or too small for float32."""
    power = -weight.abs().amax(2).frexp().exponent.clamp(-126, 126)  # (out, groups)
    near = weight.ldexp(power.unsqueeze(2))  # powers of two change no code
    cost: Tensor | None = None
    for scale, *others in candidates(weight):
        error = nearest(near, scale.ldexp(power).unsqueeze(2), *(part.unsqueeze(2) for part in others)).sub_(near).square_()
        new = (error if importance is None else error.mul_(importance)).sum(2)  # (out, groups)
        if cost is None:
            cost, best = new, (scale, *others)
            continue
        better = new < cost
        cost = torch.where(better, new, cost)
        best = tuple(torch.where(better, part, old) for part, old in zip((scale, *others), best, strict=True))
    return best
