"""The scale of each group of weights, the one of several candidates that costs the group least."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from typing import Any

import torch
from torch import Tensor

CHUNK = 1 << 18  # weights whose candidates are compared at a time: they stay in cache
NARROW = 16  # weights of a group

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
    return tuple(torch.cat(parts).T.contiguous().T for parts in zip(*found, strict=True))  # a sweep reads column by column


def grouped(x: Tensor, group: int) -> Tensor:
    """(out, in) -> (out, groups, group)."""
    return x.reshape(len(x), -1, group)


def _best(weight: Tensor, importance: Tensor | None, candidates: Candidates, nearest: Nearest) -> Parts:
    """Judged near 1, where no square is too large or too small for float32.

    What a candidate costs a group's least and greatest weight, it costs the group at least: where that is too much for all groups
    here, nothing else is looked at.
    """
    narrow = weight.shape[2] == NARROW
    if narrow:  # in memory each place in the groups becomes a row, since loops along a few numbers are slow
        weight = weight.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    least, most = weight.amin(2), weight.amax(2)  # (out, groups)
    power = torch.ones_like(most).ldexp(-most.maximum(-least).frexp().exponent.clamp(-126, 126))
    near, ends = weight * power.unsqueeze(2), torch.stack([least, most]) * power  # powers of two change no code
    lowest = None if importance is None else importance.amin(1)

    def errors(x: Tensor, costs: Tensor | None, scale: Tensor, *others: Tensor) -> Tensor:
        error = nearest(x, scale, *others).sub_(x).square_()
        return error if costs is None else error.mul_(costs)

    def costs(scale: Tensor, *others: Tensor) -> Tensor:  # (out, groups)
        error = errors(near, importance, (scale * power).unsqueeze(2), *(part.unsqueeze(2) for part in others))
        if narrow:
            error = error[..., : NARROW // 2].add_(error[..., NARROW // 2 :])
        return error.sum(2)

    tried = candidates(weight)
    best = next(tried)
    cost = costs(*best)
    with contextlib.suppress(StopIteration):
        while True:
            candidate = tried.send(best)
            if not narrow and (errors(ends, lowest, candidate[0] * power, *candidate[1:]).amax(0) >= cost).all():
                continue
            better = (new := costs(*candidate)) < cost
            cost = torch.minimum(new, cost)
            best = tuple(torch.where(better, part, old) for part, old in zip(candidate, best, strict=True))
    return best
