"""The scale of each group of weights, the one of several candidates that costs the group least."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from typing import Any

import torch
from torch import Tensor

CHUNK = 1 << 18  # weights whose candidates are compared at a time: they stay near, and calls are few

Parts = tuple[Tensor, ...]  # (out, groups) each; the first is the scale
Candidates = Callable[[Tensor], Generator[Parts, Any, None]]
Nearest = Callable[..., Tensor]


def search(weight: Tensor, importance: Tensor | None, group: int, candidates: Candidates, nearest: Nearest) -> Parts:
    """The candidate of every group with the least Σ importance (w - q)²; of equals the first.

    Args:
        weight: (out, in) float32, the width a multiple of `group`.
        importance: (in,) what an error costs in each column; None where all cost the same.
        candidates: given weights (out, groups, group), yields what is tried, and is sent the best so far.
        nearest: given weights and a candidate's parts (out, groups, 1), the representable numbers nearest to them. Weights and
            scale come multiplied by one power of two.
    """
    costs = None if importance is None else importance.view(-1, group)
    chunks = torch.split(weight, max(CHUNK // weight.shape[1], 1))
    found = [_best(grouped(chunk, group), costs, candidates, nearest) for chunk in chunks]
    columns = ([part.T for part in parts] for parts in zip(*found, strict=True))
    return tuple(torch.cat(parts, dim=1).T for parts in columns)  # each column of groups in one piece: a sweep asks for one


def grouped(x: Tensor, group: int) -> Tensor:
    """(out, in) -> (out, groups, group)."""
    return x.reshape(len(x), -1, group)


def _best(weight: Tensor, importance: Tensor | None, candidates: Candidates, nearest: Nearest) -> Parts:
    """Judged near 1, where no square is too large or too small for float32."""
    power = -weight.abs().amax(2).frexp().exponent.clamp(-126, 126)  # (out, groups)
    factor = torch.ones_like(power, dtype=weight.dtype).ldexp(power)
    near = weight * factor.unsqueeze(2)  # powers of two change no code

    def costs(scale: Tensor, *others: Tensor) -> Tensor:  # (out, groups)
        error = nearest(near, (scale * factor).unsqueeze(2), *(part.unsqueeze(2) for part in others)).sub_(near).square_()
        return (error if importance is None else error.mul_(importance)).sum(2)

    tried = candidates(weight)
    best = next(tried)
    cost = costs(*best)
    with contextlib.suppress(StopIteration):
        while True:
            candidate = tried.send(best)
            better = (new := costs(*candidate)) < cost
            cost = torch.where(better, new, cost)
            best = tuple(torch.where(better, part, old) for part, old in zip(candidate, best, strict=True))
    return best
