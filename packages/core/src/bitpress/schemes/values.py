"""The values that hooks receive and return. All are frozen: a hook returns a new one made with
`attrs.evolve`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from attrs import field, frozen

from bitpress.schemes.deprecation import accept_old_names

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@frozen(eq=False)
class QuantizedTensor:
    """Numbers as codes that groups of columns share a scale with: (codes - zero_point) · scale.

    Attributes:
        codes: (rows, in), integers or numbers of a small floating format.
        scale: (rows, groups) or, where rows share them, (1, groups); float32.
        zero_point: as `scale`, of any dtype; None where it is 0.
        group_index: (in,) integers, the group of each column; None where groups are runs of
            columns, all as long.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None = None
    group_index: Tensor | None = None

    def dequantize(self) -> Tensor:
        """(rows, in) float32."""
        numbers = self.codes.float()
        if self.zero_point is not None:
            numbers = numbers - self._of_columns(self.zero_point.float())
        return numbers * self._of_columns(self.scale)

    def rows(self, first: int, last: int) -> QuantizedTensor:
        """Rows `first` to `last` (exclusive)."""

        def cut(tensor: Tensor) -> Tensor:
            return tensor[first:last] if len(tensor) == len(self.codes) else tensor

        zero_point = None if self.zero_point is None else cut(self.zero_point)
        return QuantizedTensor(cut(self.codes), cut(self.scale), zero_point, self.group_index)

    def _of_columns(self, parameters: Tensor) -> Tensor:
        """A group's parameters for each of its columns."""
        if self.group_index is not None:
            return parameters.index_select(1, self.group_index.long())
        num_columns, num_groups = self.codes.shape[1], parameters.shape[1]
        if num_groups == 1:
            return parameters
        return parameters.repeat_interleave(num_columns // num_groups, 1)


@frozen
class CodeForm:
    """In what form a source holds the codes of a weight, as its config and the headers of its files
    say.

    Attributes:
        numbers: what codes are: integers, or numbers of a floating format, E2M1 of 4 bits or E4M3
            of 8.
        bits: of a code.
        group: rows and columns of the weight that share a scale.
        scale_dtype: in which scales are stored.
        has_zero_points: whether groups have zero points.
    """

    numbers: Literal["integer", "float"]
    bits: int
    group: tuple[int, int]
    scale_dtype: torch.dtype
    has_zero_points: bool = False

    def __str__(self) -> str:
        rows, columns = self.group
        kind = {"integer": "integers", "float": "floating-point numbers"}[self.numbers]
        shared = f"in groups of {columns}" if rows == 1 else f"in tiles of {rows} x {columns}"
        zeros = " with zero points" if self.has_zero_points else ""
        scales = str(self.scale_dtype).removeprefix("torch.")
        return f"{self.bits}-bit {kind} {shared}{zeros}, scales in {scales}"


@frozen(eq=False)
class Layer:
    """One linear layer, several stacked by rows because they read the same input, or a tile of
    whole rows of either.

    `weight` may be given as a function of no arguments, which is called whenever `weight` is read:
    where nobody reads it, it costs nothing.

    Attributes:
        name: of the layer or the stack, for messages.
        dtype: what the model stores its weights in, and computes in when served.
        mask: (out, in) bool; where it is False the weight must stay zero. None masks nothing.
        original_weight: (out, in) float32: the weight before any step, with which statistics were
            taken; None where that is `weight`.
        codes: what is stored, unpacked, one row per output; after `pack`, packed. None while the
            weight itself is stored.
        qparams: what is stored beside the codes, by name: "scale" (out, groups), "zero_point", ...
            The leading axis follows the rows (one entry per row or per `row_block` of them); a
            tensor without axes is one number for the whole stack.
        quantized: what the weight was decoded from, where the source holds it so: a scheme that can
            store these very numbers need not round them again. None where the source holds numbers,
            and in a calibrated run where the scheme does not keep the codes.
    """

    name: str
    _weight: Tensor | Callable[[], Tensor] = field(repr=False)
    dtype: torch.dtype
    mask: Tensor | None = field(default=None, repr=False)
    original_weight: Tensor | None = field(default=None, repr=False)
    codes: Tensor | None = field(default=None, repr=False)
    qparams: Mapping[str, Tensor] = field(factory=dict, repr=False)
    quantized: QuantizedTensor | None = field(default=None, repr=False)

    @property
    def weight(self) -> Tensor:
        """(out, in) float32: the numbers the served model will compute with, after every step so
        far.
        """
        return self._weight() if callable(self._weight) else self._weight


accept_old_names(Layer, {"keep": "mask", "parts": "qparams", "source": "original_weight"})


@frozen(eq=False)
class Statistic:
    """A raw sum or maximum over one batch; `a | b` is the same over both, in any order.

    Attributes:
        value: float32, of a shape that does not depend on the batch.
        merge: how the values of two batches become one.
        rows: whether the value's first axis is the weight's rows.
    """

    value: Tensor
    merge: Literal["sum", "max"]
    rows: bool = False

    def __or__(self, other: Statistic) -> Statistic:
        if self.merge != other.merge:
            raise ValueError(f"a {self.merge} cannot be merged with a {other.merge}")
        if self.merge == "sum":
            merged = self.value + other.value
        else:
            merged = self.value.maximum(other.value)
        return Statistic(merged, self.merge, self.rows)

    def of(self, rows: slice) -> Statistic:
        """The statistic of some rows of the weight."""
        return Statistic(self.value[rows], self.merge, True) if self.rows else self


@frozen(eq=False)
class StoredLayer:
    """What is stored of one linear layer.

    Attributes:
        tensors: by suffix of the module's name: `weight`, `weight_scale`, ...
        config: the group entry of `quantization_config` that tells a loader how to read them (JSON
            values: `format`, `weights`, `input_activations`), and under `sparsity_config` what it
            says of zeros (`format`, `sparsity_structure`); None for a plain weight.
    """

    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any] | None = None


# How much work a run may put into a result, from least to most. What a level means for a scheme its
# module says in `EFFORTS`; at NORMAL_EFFORT it has its default options.
EFFORT_LEVELS = ("low", "normal", "high")
LEAST_EFFORT, NORMAL_EFFORT = "low", "normal"

# Levels of findings that need no warning.
USABLE = ("recommended", "supported")


@frozen
class Finding:
    """One remark of a scheme about a device, or about a layer on it.

    Attributes:
        level: how well it will be served.
        text: one line that says why.
    """

    level: Literal["recommended", "supported", "degraded", "unsupported"]
    text: str


# Where a scheme leaves a device out.
NOTHING_KNOWN = Finding("unsupported", "the scheme says nothing about hardware")


@frozen
class MeasuredLoss:
    """What a scheme has lost on one model; a scheme's module lists some as `MEASURED_LOSSES`, in
    the order in which it would take the options.

    It is shown as measured on that model, and never as a prediction for another.

    Attributes:
        model: its name, and on what it was measured: "SmolLM2-135M-Instruct (wikitext2)".
        kl: mean KL divergence from the source's predictions, in nats per token, on a text that it
            was not calibrated on.
        options: that differ from the scheme's defaults.
        then: the scheme that followed with its defaults, if one did.
    """

    model: str
    kl: float
    options: Mapping[str, Any] = field(factory=dict)
    then: str | None = None
