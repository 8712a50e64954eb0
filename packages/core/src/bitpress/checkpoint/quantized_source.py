"""A model that is published in fewer bits than 16, as a source format describes it: of which stored
tensors each weight is made, and how.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, Literal

from attrs import field, frozen

from bitpress.schemes.values import CodeForm, QuantizedTensor

if TYPE_CHECKING:
    from torch import Tensor


@frozen
class StoredPart:
    """A stored tensor of which a weight is made.

    Attributes:
        name: of the tensor in the files.
        block_size: how many of its entries along `axis` belong to a block of the weight's rows;
            None where all of it belongs to each of them.
        axis: that follows the weight's rows; a tensor of which it is 1 is read as a whole.
    """

    name: str
    block_size: int | None = None
    axis: Literal[0, 1] = 0


@frozen(eq=False)
class QuantizedWeight:
    """A weight that files hold in another form than as a number for each.

    Attributes:
        shape: of the weight: (out, in) of a linear layer.
        parts: the stored tensors by the names that `decode` knows them by; the first lies where
            the weight is taken to lie.
        decode: makes the weight, or consecutive blocks of its rows, of the parts, or of the entries
            of these that belong to the blocks: codes and scales, or else float32 (rows, ...). The
            last block may be short.
        row_block: how many rows are a block.
        form: that all of its codes have; None where it has none, or where that is not known.
    """

    shape: tuple[int, ...]
    parts: Mapping[str, StoredPart]
    decode: Callable[[Mapping[str, Tensor]], QuantizedTensor | Tensor]
    row_block: int = 1
    form: CodeForm | None = None


@frozen(eq=False)
class QuantizedSource:
    """What a source format makes of a model's files.

    Attributes:
        method: what the model was quantized with, in a word or two that its users know.
        weights: by the name that they have in the model.
        left_out: names of stored tensors that the model which they stand for has not, beside the
            parts of weights.
        renamed: by the name in the files, the name in the model of tensors that are copied.
        config_values: of keys of `config.json` by which engines choose how they read weights, the
            values of the model that the files stand for.
        left_files: files beside the weights that describe the quantization alone.
        remarks: what is lost by reading it so, a line each.
    """

    method: str
    weights: Mapping[str, QuantizedWeight]
    left_out: Collection[str] = ()
    renamed: Mapping[str, str] = field(factory=dict)
    config_values: Mapping[str, Any] = field(factory=dict)
    left_files: Collection[str] = ()
    remarks: Collection[str] = ()
