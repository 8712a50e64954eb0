"""Weights without the zeros between them, and a bit for each position: the layouts `sparse-bitmask`
and `sparse-24-bitmask` that compressed-tensors read up to 0.14, for numbers of any kind.

Bit i of byte j of a row stands for column 8 j + i. Every row keeps as many numbers, zeros that the
mask keeps among them, so that their number follows from the options.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bitpress import RecipeError, StoredLayer, numerics

if TYPE_CHECKING:
    from torch import Tensor

# Suffixes of what is stored.
VALUES, MASK, SHAPE, ROW_OFFSETS = "compressed", "bitmask", "shape", "row_offsets"

# Formats, as compressed-tensors names them: of 2:4, and of rows that follow each other in one axis.
QUADS, CHAINED = "sparse-24-bitmask", "sparse-bitmask"

# In place of which the kept numbers are stored: as they are, or as codes in 32-bit words.
NUMBERS, WORDS = "weight", "weight_packed"


def compress(numbers: Tensor, mask: Tensor) -> Tensor:
    """(out, kept): the numbers where the mask (out, in) is True, as many in every row."""
    kept = as_integers(numbers)[mask].view(numbers.dtype)
    return kept.view(len(numbers), -1)


def as_integers(numbers: Tensor) -> Tensor:
    """The same bits as integers: not every kind of number can be picked, multiplied or padded."""
    import torch

    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return numbers.view(integers[numbers.element_size()])


def pack_mask(mask: Tensor) -> Tensor:
    """(out, in) bool -> (out, ceil(in / 8)) uint8."""
    import torch

    padded = torch.nn.functional.pad(mask, (0, -mask.shape[1] % 8)).view(len(mask), -1, 8)
    return (padded << torch.arange(8, device=mask.device)).sum(2).to(torch.uint8)


def unpack_mask(packed_mask: Tensor, width: int) -> Tensor:
    """(out, width) bool, from what `pack_mask` gave."""
    import torch

    shifts = torch.arange(8, dtype=torch.uint8, device=packed_mask.device)
    bits = packed_mask.unsqueeze(2) >> shifts & 1  # (out, bytes, 8)
    return bits.flatten(1)[:, :width].bool()


def decompress(values: Tensor, mask: Tensor) -> Tensor:
    """(out, in): the numbers that `compress` took from where the mask is True, and zeros.

    Raises:
        ValueError: the mask does not keep as many numbers as there are.
    """
    if mask.sum() != values.numel():
        raise ValueError(
            f"its mask keeps {int(mask.sum())} weights, and {values.numel()} are there"
        )
    numbers = as_integers(values).new_zeros(mask.shape)
    numbers[mask] = as_integers(values).flatten()
    return numbers.view(values.dtype)


def lay_out(
    stored: StoredLayer, packed_mask: Tensor, shape: tuple[int, int], is_chained: bool
) -> dict[str, Tensor]:
    """What is stored of a layer in this layout.

    Args:
        stored: of the layer, of whose numbers only those that the mask keeps are left.
        packed_mask: (out, ceil(in / 8)) uint8.
        shape: (out, in) of the layer.
        is_chained: whether rows follow each other in one axis, as `sparse-bitmask` has it.

    Raises:
        RecipeError: the numbers are of a kind that the layout does not take.
    """
    import torch

    tensors = dict(stored.tensors)
    _require_numbers(stored)
    values = tensors.pop(WORDS if WORDS in tensors else NUMBERS)
    tensors |= {MASK: packed_mask, SHAPE: torch.tensor(shape)}
    if is_chained:
        tensors[ROW_OFFSETS] = torch.arange(shape[0]) * values.shape[1]
        values = values.flatten()
    else:
        # as the layout for 2:4 has it
        tensors[SHAPE] = tensors[SHAPE].unsqueeze(1)
    return {VALUES: values, **tensors}


def expand(tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None) -> dict[str, Tensor]:
    """What `lay_out` was given, with the numbers of all columns; of a layer or some rows of it.

    Args:
        tensors: what is stored.
        config: the layer's config fragment: `weights` says how many bits a packed code has.

    Raises:
        ValueError: the mask does not fit the numbers.
    """
    import torch

    mask = unpack_mask(tensors[MASK], int(tensors[SHAPE].flatten()[1]))
    values = tensors[VALUES].reshape(len(mask), -1)
    others = {k: t for k, t in tensors.items() if k not in (VALUES, MASK, SHAPE, ROW_OFFSETS)}
    if values.dtype != torch.int32:
        return {NUMBERS: decompress(values, mask), **others}
    bits = int((config or {})["weights"]["num_bits"])
    codes = numerics.unpack_words(values, bits, int(mask[0].sum()))
    return {WORDS: numerics.pack_words(decompress(codes, mask), bits), **others}


def _require_numbers(stored: StoredLayer) -> None:
    """Raise RecipeError unless all zeros are one code, and a row's codes can be picked from it."""
    import torch

    if NUMBERS in stored.tensors:
        return
    words = stored.tensors.get(WORDS)
    if words is None or words.dtype != torch.int32:
        kept = (stored.config or {}).get("format", "what the step after it stores")
        raise RecipeError(
            f"layout=bitmask does not take {kept}; layout=dense stores zeros like other weights"
        )
    if not (stored.config or {})["weights"].get("symmetric", True):
        raise RecipeError(
            "layout=bitmask does not take zero points: a zero has no code of its own; use "
            "symmetric=true or layout=dense"
        )
