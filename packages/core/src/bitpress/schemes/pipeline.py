"""A recipe's steps applied to one layer: a fold over the hooks. No class for any combination of
schemes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch

from bitpress.errors import RecipeError, SchemeError
from bitpress.schemes import hook_results
from bitpress.schemes.registry import Step
from bitpress.schemes.values import Layer, Statistic, StoredLayer

Statistics = Mapping[str, Statistic]


def observe_weights(
    tiles: Callable[[], Iterator[Layer]], steps: Sequence[Step]
) -> tuple[Statistics, ...]:
    """Per step, the statistics it takes of the weights alone, merged over row tiles; `tiles` starts
    a fresh pass over them.
    """
    stats: list[Statistics] = []
    for i, step in enumerate(steps):
        merged: dict[str, Statistic] = {}
        for tile in tiles() if step.scheme.has("observe") else ():
            weight = quantize(tile, steps[:i], stats).weight
            found = observe(step, weight)
            if not found:
                break
            merge(merged, found)
        stats.append(merged)
    return tuple(stats)


def observe(
    step: Step,
    weight: torch.Tensor,
    inputs: torch.Tensor | None = None,
    reference: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> Statistics | None:
    """A step's statistics of one batch, or without inputs of the weight alone."""
    found = step.call(
        "observe", inputs=inputs, reference=reference, residual=residual, weight=weight
    )
    return hook_results.stats(step, found, len(weight))


def quantize(layer: Layer, steps: Sequence[Step], stats: Sequence[Statistics]) -> Layer:
    """The layer after every step's `quantize`.

    Raises:
        RecipeError: a step follows one whose codes are what is stored, so that its own could not
            be.
    """
    for step, observed in zip(steps, stats, strict=True):
        if layer.codes is not None and step.scheme.has("quantize"):
            raise RecipeError(
                f"{step.scheme.name} cannot follow a step that stores codes already: leave one of "
                "them out"
            )
        found = hook_results.layer(
            step, "quantize", step.call("quantize", layer=layer, stats=observed), layer
        )
        layer = (
            attrs.evolve(found, original_weight=layer.weight)
            if layer.original_weight is None and found.codes is None
            else found
        )
    return layer


def quantize_whole(layer: Layer, steps: Sequence[Step], stats: Sequence[Statistics]) -> Layer:
    """The layer, whole, after every step's `quantize`, given statistics of inputs and, taken here,
    of the weights.

    A step is given the statistics of those before it too: what one has gathered of inputs, the next
    need not.
    """
    known: Statistics = {}
    for step, observed in zip(steps, stats, strict=True):
        own = dict(observed)
        if step.scheme.wants("observe", "weight"):
            merge(own, observe(step, layer.weight))
        known = {**known, **own}
        layer = quantize(layer, [step], [known])
    return layer


def merge(into: dict[str, Statistic], found: Statistics | None) -> None:
    """Add the statistics of a batch to those of the batches before it."""
    for name, stat in (found or {}).items():
        if name in into and into[name].value.shape != stat.value.shape:
            shapes = f"{list(into[name].value.shape)} and {list(stat.value.shape)}"
            raise SchemeError(
                f"statistics {name!r} of two batches have the shapes {shapes}, and cannot be added "
                "up"
            )
        into[name] = into[name] | stat if name in into else stat


def rescale(
    layer: Layer, steps: Sequence[Step], stats: Sequence[Statistics]
) -> torch.Tensor | None:
    """The factors (in,) of the first step that has some; None where none has."""
    for step, observed in zip(steps, stats, strict=True):
        if (
            step.rescales
            and (factors := step.call("rescale", layer=layer, stats=observed)) is not None
        ):
            return hook_results.factors(step, factors, layer.weight.shape[1])
    return None


def split(layer: Layer, heights: Sequence[int]) -> list[Layer]:
    """The members of a stack, not yet packed, each with its own rows of everything that has
    rows.
    """
    total, weight = sum(heights), layer.weight

    def rows(tensor: torch.Tensor, first: int, last: int) -> torch.Tensor:
        return tensor[first * len(tensor) // total : last * len(tensor) // total]

    members, first = [], 0
    for height in heights:
        place = (first, first + height)
        own: dict[str, Any] = {
            name: rows(t, *place)
            for name in ("codes", "mask")
            if (t := getattr(layer, name)) is not None
        }
        qparams = {
            name: rows(part, *place) if part.ndim else part for name, part in layer.qparams.items()
        }
        members.append(
            attrs.evolve(
                layer, weight=rows(weight, *place), original_weight=None, qparams=qparams, **own
            )
        )
        first += height
    return members


def pack(layer: Layer, steps: Sequence[Step]) -> Layer:
    """The layer after every step's `pack`."""
    for step in steps:
        layer = hook_results.layer(step, "pack", step.call("pack", layer=layer), layer)
    return layer


def join(tiles: Iterable[Layer], shape: tuple[int, ...]) -> Layer:
    """Packed row tiles of one layer as one, each copied into place as it comes.

    Beside codes, the joined weight has the right shape and is NaN everywhere: nothing that is
    stored may be taken from it.

    Args:
        shape: (out, in) of the whole layer.

    Raises:
        SchemeError: a part without axes differs between tiles: rows are not independent, as the
            scheme's options say they are.
    """
    whole: dict[str, Any] = {}
    parts: dict[str, list[torch.Tensor]] = {}
    layer, at = None, 0
    for layer in tiles:
        main = {"weight": layer.weight} if layer.codes is None else {"codes": layer.codes}
        height = len(next(iter(main.values())))
        for name, piece in (main | {"mask": layer.mask}).items():
            if piece is not None:
                if name not in whole:
                    whole[name] = (
                        piece if height == shape[0] else piece.new_empty(shape[0], *piece.shape[1:])
                    )
                if whole[name] is not piece:
                    whole[name][at : at + height] = piece
        for name, part in layer.qparams.items():
            parts.setdefault(name, []).append(part)
        at += height
    assert layer is not None, "a layer has at least one row"
    weight = whole.pop("weight", torch.full((1, 1), torch.nan).expand(shape))
    joined = {n: _join_part(layer.name, n, p) for n, p in parts.items()}
    return attrs.evolve(layer, weight=weight, original_weight=None, qparams=joined, **whole)


def record(layer: Layer, steps: Sequence[Step]) -> StoredLayer:
    """What the last step that serializes stores of a whole layer.

    Raises:
        SchemeError: no step does, or it returned something else.
    """
    for step in reversed(steps):
        if (found := step.call("serialize", layer=layer)) is not None:
            return hook_results.record(step, found)
    raise SchemeError(
        f"none of the schemes {', '.join(s.scheme.name for s in steps)} has a `serialize` hook"
    )


def dequantize(
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any] | None,
    steps: Sequence[Step],
    shape: tuple[int, ...] | None = None,
) -> torch.Tensor:
    """(out, in) float32: the weight that a loader computes with, by the scheme that wrote the
    tensors.

    Raises:
        SchemeError: no step can, or it gives a weight of another than the expected shape.
    """
    for step in reversed(steps):
        if (weight := step.scheme.call("dequantize", tensors=tensors, config=config)) is not None:
            return hook_results.restored(step.scheme, "dequantize", weight, shape)
    raise SchemeError(
        f"none of the schemes {', '.join(s.scheme.name for s in steps)} can restore what it wrote"
    )


def validate_weight(weight: torch.Tensor, steps: Sequence[Step]) -> Iterator[str]:
    """What of their promises a restored weight (out, in) breaks, step by step."""
    for step in steps:
        if (found := step.call("validate_weight", weight=weight)) is not None:
            yield f"{step.scheme.name}: {found}"


def error_bound(
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any] | None,
    steps: Sequence[Step],
    shape: tuple[int, ...] | None = None,
) -> torch.Tensor | None:
    """How far each weight may be from its source; None where a step promises nothing, or several
    steps moved it.
    """
    found = (
        steps[0].scheme.call("error_bound", tensors=tensors, config=config)
        if len(steps) == 1
        else None
    )
    return (
        None
        if found is None
        else hook_results.restored(steps[0].scheme, "error_bound", found, shape, broadcast=True)
    )


def _join_part(layer: str, name: str, pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    first = pieces[0]
    if first.ndim:
        return torch.cat(list(pieces)) if len(pieces) > 1 else first
    if not all(torch.equal(first, piece) for piece in pieces):
        raise SchemeError(
            f"{layer}: part {name!r} is one number for the stack, yet row tiles differ; gather it "
            "in `observe`"
        )
    return first
