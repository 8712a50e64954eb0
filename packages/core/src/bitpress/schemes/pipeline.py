"""A recipe's steps applied to one layer, hook by hook.

A composition of schemes is a fold over their steps: no class stands for any combination.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch

from bitpress.errors import RecipeError, SchemeError
from bitpress.schemes import hook_results
from bitpress.schemes.registry import Step
from bitpress.schemes.values import Layer, Statistic, StoredLayer

Statistics = Mapping[str, Statistic]

# What `observe` takes of a batch, where there is none.
NO_BATCH = dict.fromkeys(("inputs", "reference", "residual", "output_gradient"))

# Rows and columns of a weight of ones, with which a scheme is asked what it observes.
NUM_PROBE_ROWS, NUM_PROBE_COLUMNS = 128, 256


def observe_weights(
    tiles: Callable[[], Iterator[Layer]], steps: Sequence[Step]
) -> tuple[Statistics, ...]:
    """Per step, the statistics it takes of the weights alone, merged over row tiles.

    Args:
        tiles: starts a new pass over the row tiles of a layer.
        steps: of the layer.
    """
    stats: list[Statistics] = []
    for i, step in enumerate(steps):
        merged: dict[str, Statistic] = {}
        for tile in tiles() if step.scheme.has("observe") else ():
            # A step sees the weight as the steps before it leave it.
            weight = quantize(tile, steps[:i], stats).weight
            tile_stats = observe(step, weight)
            if not tile_stats:
                break
            merge(merged, tile_stats)
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
    if not step.options.uses_reference:
        reference = residual = None
    return _observe(step, weight, inputs=inputs, reference=reference, residual=residual)


def observe_gradient(
    step: Step, weight: torch.Tensor, output_gradient: torch.Tensor
) -> Statistics | None:
    """A step's statistics of one batch's gradient of a layer's output (tokens, out)."""
    return _observe(step, weight, output_gradient=output_gradient)


def _observe(step: Step, weight: torch.Tensor, **batch: torch.Tensor | None) -> Statistics | None:
    """The hook, with None for what is not given of a batch."""
    arguments = {**NO_BATCH, **batch}
    result = step.call("observe", **arguments, weight=weight)
    return hook_results.check_statistics(step, result, len(weight))


# A run asks for every batch and every layer.
@functools.lru_cache(maxsize=64)
def takes_reference(step: Step) -> bool:
    """Whether a step, with its options, takes other statistics where it is given a layer's inputs
    in the source model too: it is asked with one token, which that model has other inputs for.
    """
    if not step.calibrated or not step.scheme.takes_argument("observe", "reference"):
        return False
    weight, inputs = _make_probe()
    alone = observe(step, weight, inputs) or {}
    compared = observe(step, weight, inputs, reference=2 * inputs) or {}
    return alone.keys() != compared.keys() or not all(
        torch.equal(stat.value, compared[name].value) for name, stat in alone.items()
    )


@functools.lru_cache(maxsize=64)
def takes_second_moments(step: Step) -> bool:
    """Whether a step, with its options, takes a statistic (in, in) of a layer's inputs: it is asked
    with one token.
    """
    if not step.calibrated or not step.scheme.takes_argument("observe", "inputs"):
        return False
    shapes = {stat.value.shape for stat in (observe(step, *_make_probe()) or {}).values()}
    return (NUM_PROBE_COLUMNS, NUM_PROBE_COLUMNS) in shapes


def _make_probe() -> tuple[torch.Tensor, torch.Tensor]:
    """A weight (out, in), and an input (1, in)."""
    return torch.ones(NUM_PROBE_ROWS, NUM_PROBE_COLUMNS), torch.ones(1, NUM_PROBE_COLUMNS)


@functools.lru_cache(maxsize=64)
def takes_gradient(step: Step) -> bool:
    """Whether a step, with its options, takes statistics of the gradients of outputs: it is asked
    with one token.
    """
    is_asked = step.calibrated and step.options.uses_reference
    if not is_asked or not step.scheme.takes_argument("observe", "output_gradient"):
        return False
    weight, _ = _make_probe()
    gradient = torch.zeros(1, NUM_PROBE_ROWS)
    return bool(observe_gradient(step, weight, gradient))


def quantize(layer: Layer, steps: Sequence[Step], stats: Sequence[Statistics]) -> Layer:
    """The layer after every step's `quantize`.

    Raises:
        RecipeError: a step follows one whose codes are what is stored, so that its own could not
            be.
    """
    for step, step_stats in zip(steps, stats, strict=True):
        if layer.codes is not None and step.scheme.has("quantize"):
            raise RecipeError(
                f"{step.scheme.name} cannot follow a step that stores codes already: leave one of "
                "them out"
            )
        result = step.call("quantize", layer=layer, stats=step_stats)
        quantized = hook_results.check_layer(step, "quantize", result, layer)
        # Only where another step may follow is the weight from before any step of use.
        if layer.original_weight is None and quantized.codes is None:
            quantized = attrs.evolve(quantized, original_weight=layer.weight)
        layer = quantized
    return layer


def quantize_whole(layer: Layer, steps: Sequence[Step], stats: Sequence[Statistics]) -> Layer:
    """The layer, with all its rows, after every step's `quantize`.

    A step is given the statistics of those before it too: what one has gathered of inputs, the next
    need not.

    Args:
        layer: with all its rows.
        steps: of the layer.
        stats: per step, of its inputs; those of the weight are taken here.
    """
    available: Statistics = {}
    for step, input_stats in zip(steps, stats, strict=True):
        step_stats = dict(input_stats)
        if step.scheme.takes_argument("observe", "weight"):
            merge(step_stats, observe(step, layer.weight))
        available = {**available, **step_stats}
        layer = quantize(layer, [step], [available])
    return layer


def merge(merged: dict[str, Statistic], batch_stats: Statistics | None) -> None:
    """Add the statistics of a batch to those of the batches before it.

    Raises:
        SchemeError: one has another shape than before.
    """
    for name, stat in (batch_stats or {}).items():
        if name not in merged:
            merged[name] = stat
            continue
        before = merged[name]
        if before.value.shape != stat.value.shape:
            shapes = f"{list(before.value.shape)} and {list(stat.value.shape)}"
            raise SchemeError(
                f"statistics {name!r} of two batches have the shapes {shapes}, and cannot be added "
                "up"
            )
        merged[name] = before | stat


def take_rows(stats: Statistics, first: int, last: int) -> Statistics:
    """The statistics of some rows of a layer, of those of all."""
    return {
        name: attrs.evolve(stat, value=stat.value[first:last]) if stat.rows else stat
        for name, stat in stats.items()
    }


def rescale(
    layer: Layer, steps: Sequence[Step], stats: Sequence[Statistics]
) -> torch.Tensor | None:
    """The factors (in,) of the first step that has some; None where none has."""
    for step, step_stats in zip(steps, stats, strict=True):
        if not step.rescales:
            continue
        factors = step.call("rescale", layer=layer, stats=step_stats)
        if factors is not None:
            return hook_results.check_factors(step, factors, layer.weight.shape[1])
    return None


def split(layer: Layer, heights: Sequence[int]) -> list[Layer]:
    """The members of a stack, each with its rows of everything that has rows.

    Args:
        layer: quantized, not yet packed.
        heights: rows of each member.
    """
    total, weight = sum(heights), layer.weight

    def take_rows(tensor: torch.Tensor, first: int, last: int) -> torch.Tensor:
        # One entry may stand for several rows, and the number of the whole stack has none.
        if not tensor.ndim:
            return tensor
        return tensor[first * len(tensor) // total : last * len(tensor) // total]

    members, first = [], 0
    for height in heights:
        last = first + height
        member = attrs.evolve(
            layer,
            weight=take_rows(weight, first, last),
            original_weight=None,
            codes=None if layer.codes is None else take_rows(layer.codes, first, last),
            mask=None if layer.mask is None else take_rows(layer.mask, first, last),
            qparams={name: take_rows(t, first, last) for name, t in layer.qparams.items()},
        )
        members.append(member)
        first = last
    return members


def pack(layer: Layer, steps: Sequence[Step]) -> Layer:
    """The layer after every step's `pack`."""
    for step in steps:
        layer = hook_results.check_layer(step, "pack", step.call("pack", layer=layer), layer)
    return layer


def join(tiles: Iterable[Layer], shape: tuple[int, ...]) -> Layer:
    """Packed row tiles of one layer as one, each copied into its rows as it comes.

    Beside codes, the joined weight has the right shape and is NaN everywhere: nothing that is
    stored may be taken from it.

    Args:
        tiles: from the first rows to the last.
        shape: (out, in) of the whole layer.

    Raises:
        SchemeError: a number for the whole layer differs between tiles: rows are not independent,
            as the scheme's options say they are.
    """
    joined: dict[str, torch.Tensor] = {}
    qparams: dict[str, list[torch.Tensor]] = {}
    tile, first = None, 0
    for tile in tiles:
        stored = {"weight": tile.weight} if tile.codes is None else {"codes": tile.codes}
        height = len(next(iter(stored.values())))
        if tile.mask is not None:
            stored["mask"] = tile.mask
        for name, piece in stored.items():
            # A single tile is taken as it is.
            if height == shape[0]:
                joined[name] = piece
                continue
            if name not in joined:
                joined[name] = piece.new_empty(shape[0], *piece.shape[1:])
            joined[name][first : first + height] = piece
        for name, piece in tile.qparams.items():
            qparams.setdefault(name, []).append(piece)
        first += height

    assert tile is not None, "a layer has at least one row"
    nan = torch.full((1, 1), torch.nan).expand(shape)
    return attrs.evolve(
        tile,
        weight=joined.get("weight", nan),
        original_weight=None,
        codes=joined.get("codes", tile.codes),
        mask=joined.get("mask", tile.mask),
        qparams={name: _join_qparam(tile.name, name, pieces) for name, pieces in qparams.items()},
    )


def serialize(layer: Layer, steps: Sequence[Step]) -> StoredLayer:
    """What the last step that serializes stores of a whole layer, as steps before it lay it out.

    Raises:
        SchemeError: no step does, or it returned something else.
    """
    stored: StoredLayer | None = None
    for step in reversed(steps):
        if stored is not None and not step.scheme.takes_argument("serialize", "stored"):
            continue
        result = step.call("serialize", layer=layer, stored=stored)
        if result is not None:
            stored = hook_results.check_stored_layer(step, result)
    if stored is None:
        raise SchemeError(
            f"none of the schemes {', '.join(s.scheme.name for s in steps)} has a `serialize` hook"
        )
    return stored


def expand(
    tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any] | None, steps: Sequence[Step]
) -> Mapping[str, torch.Tensor]:
    """What is stored of a layer, or of some rows of it, in the layout of the step that wrote it."""
    for step in steps:
        result = step.scheme.call("expand", tensors=tensors, config=config)
        if result is not None:
            tensors = hook_results.check_expanded(step.scheme, result)
    return tensors


def dequantize(
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any] | None,
    steps: Sequence[Step],
    shape: tuple[int, ...] | None = None,
) -> torch.Tensor:
    """(out, in) float32: the weight that a loader computes with, by the scheme that wrote the
    tensors.

    Args:
        tensors: what is stored of the layer.
        config: its config fragment.
        steps: of the layer.
        shape: (out, in); None where any shape will do.

    Raises:
        SchemeError: no step has the hook, or it gives a weight of another shape.
    """
    tensors = expand(tensors, config, steps)
    for step in reversed(steps):
        weight = step.scheme.call("dequantize", tensors=tensors, config=config)
        if weight is not None:
            return hook_results.check_tensor(step.scheme, "dequantize", weight, shape)
    raise SchemeError(
        f"none of the schemes {', '.join(s.scheme.name for s in steps)} has a `dequantize` hook"
    )


def validate_weight(weight: torch.Tensor, steps: Sequence[Step]) -> Iterator[str]:
    """What of their promises a dequantized weight (out, in) breaks, step by step."""
    for step in steps:
        broken_promise = step.call("validate_weight", weight=weight)
        if broken_promise is not None:
            yield f"{step.scheme.name}: {broken_promise}"


def error_bound(
    stored: StoredLayer, steps: Sequence[Step], weight: torch.Tensor
) -> torch.Tensor | None:
    """How far each weight may be from the source's, broadcastable to (out, in); None where a step
    promises nothing.

    A fold over the steps, from the last one that stored the layer to the first.

    Args:
        stored: what is stored of the layer, or of some rows of it.
        steps: of the layer.
        weight: (out, in) float32, what is stored, dequantized.
    """
    bound = None
    tensors = expand(stored.tensors, stored.config, steps)
    for step in reversed(steps):
        bound = step.call(
            "error_bound", tensors=tensors, config=stored.config, weight=weight, bound=bound
        )
        if bound is None:
            return None
        shape = tuple(weight.shape)
        hook_results.check_tensor(step.scheme, "error_bound", bound, shape, broadcast=True)
    return bound


def _join_qparam(layer: str, name: str, pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    first = pieces[0]
    if first.ndim:
        return torch.cat(list(pieces)) if len(pieces) > 1 else first
    if not all(torch.equal(first, piece) for piece in pieces):
        raise SchemeError(
            f"{layer}: qparams[{name!r}] is one number for the stack, yet row tiles differ; gather "
            "it in `observe`"
        )
    return first
