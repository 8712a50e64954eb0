"""What is proved of a layer's stored numbers, in memory before they are written and on files
afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from attrs import frozen

from bitpress.errors import SchemeError
from bitpress.modeling import metrics
from bitpress.schemes import pipeline
from bitpress.schemes.registry import Step
from bitpress.schemes.values import StoredLayer

# A layer whose stored weight is further from the source's than most of its norm holds little of
# it: zeros are as far as the norm, and another layer's weights further.
MAX_ERROR = 0.95

# Error feedback moves weights further than plain rounding does, to make up for errors: of the
# layers of examples/tiny-llama at most 3.4 times as far in every scheme.
MAX_ROUNDING_ERRORS = 8.0

# Beside schemes of fewer bits, a layer of 8 bits makes up for the errors of others, which are
# larger than its own: in the same model by up to 0.11 of its norm.
MAX_SHIFT = 0.5

# With two bits or fewer, rounding itself moves weights by most of their norm, and error feedback
# further.
FEW_BITS = 2.5

# Weights whose squares add up to no more are below every scale that formats hold, and zeros are
# the nearest numbers.
NEGLIGIBLE = 1e-60

# Errors of the same numbers, computed on any machine, differ by no more than this share: each
# term is exact to the bit, and their float64 sum depends on the order alone.
ERROR_TOLERANCE = 1e-9


@frozen
class LayerMeasurement:
    """What was measured of a layer, or of rows of it; `a | b` is that of both.

    Attributes:
        faults: what is wrong with the numbers, a text each.
        squared_error: Σ (dequantized - source)²; 0 where there was no source.
        squared_norm: Σ source².
        is_bounded: whether each weight was held to a bound of its own.
    """

    faults: frozenset[str] = frozenset()
    squared_error: float = 0.0
    squared_norm: float = 0.0
    is_bounded: bool = True

    def __or__(self, other: LayerMeasurement) -> LayerMeasurement:
        return LayerMeasurement(
            self.faults | other.faults,
            self.squared_error + other.squared_error,
            self.squared_norm + other.squared_norm,
            self.is_bounded and other.is_bounded,
        )

    @property
    def error(self) -> float:
        """||dequantized - source|| / ||source||; infinite where zeros became something else."""
        if self.squared_error and not self.squared_norm:
            return math.inf
        return metrics.relative_error(self.squared_error, self.squared_norm)


def prove_stored(
    stored: StoredLayer, steps: tuple[Step, ...], weight: torch.Tensor, source: torch.Tensor
) -> LayerMeasurement:
    """Measure what is to be stored of a layer, or of some rows of it, before it is written.

    Args:
        stored: what is stored.
        steps: that stored it.
        weight: (out, in) float32, as `quantize` returned it.
        source: (out, in) float32, before any step.

    Raises:
        SchemeError: what is stored does not decode to `weight`, to the bit.
    """
    decoded = pipeline.dequantize(stored.tensors, stored.config, steps, tuple(weight.shape))
    if not torch.equal(decoded, weight.to(decoded.device)):
        raise SchemeError(
            f"{steps[-1].scheme}: what it stores does not decode to the weight that `quantize` "
            "returned; `dequantize` must be the inverse of `pack` and `serialize`"
        )
    return _measure(stored, steps, decoded, source)


def measure_stored(
    stored: StoredLayer,
    steps: tuple[Step, ...],
    shape: tuple[int, int],
    source: torch.Tensor | None,
) -> LayerMeasurement:
    """Measure what is stored of a layer, or of some rows of it.

    Args:
        shape: (out, in) of the rows.
        source: (out, in) float32, the source's weight after the factors that were folded into it;
            None where it is not known.
        stored: what is stored of them, by `steps`.

    Raises:
        SchemeError: a hook failed.
    """
    decoded = pipeline.dequantize(stored.tensors, stored.config, steps, shape)
    return _measure(stored, steps, decoded, source)


def find_error_faults(
    measured: LayerMeasurement, recorded: float | None, rounding_error: float | None
) -> Iterator[str]:
    """What the error of a layer shows.

    Args:
        measured: on what is stored.
        recorded: the error that the run has measured; None where it has not.
        rounding_error: that of plain rounding, where the run moved weights further on purpose.
    """
    error = measured.error
    if not math.isfinite(error):
        yield f"its error is {error}: zeros of the source became something else"
    elif error > max_error(rounding_error) and measured.squared_norm > NEGLIGIBLE:
        yield (
            f"its error is {error:.4g}, more than the {max_error(rounding_error):.4g} that its "
            "scheme may move it by"
        )
    if recorded is not None and not abs(error - recorded) <= ERROR_TOLERANCE * recorded:
        yield f"its error is {error!r}, and was {recorded!r} when it was written"


def max_error(rounding_error: float | None) -> float:
    """The largest error that a layer may have.

    Args:
        rounding_error: that of plain rounding, where the scheme moves weights further on purpose.
    """
    if rounding_error is None:
        return MAX_ERROR
    limit = min(max(MAX_ROUNDING_ERRORS * rounding_error, MAX_SHIFT), MAX_ERROR)
    return max(limit, FEW_BITS * rounding_error)


def _measure(
    stored: StoredLayer,
    steps: tuple[Step, ...],
    weight: torch.Tensor,
    source: torch.Tensor | None,
) -> LayerMeasurement:
    """Measure the weight that what is stored decodes to."""
    faults = set(pipeline.validate_weight(weight, steps))
    scales = {
        suffix: tensor
        for suffix, tensor in stored.tensors.items()
        if "scale" in suffix and tensor.is_floating_point()
    }
    # a finite sum has finite terms, and is found several times as fast
    total, *are_usable = _read(weight.sum(), *map(_is_usable_scale, scales.values()))
    for suffix, is_usable in zip(scales, are_usable, strict=True):
        if not is_usable:
            faults.add(f"{suffix} has a scale that is zero, infinite or NaN")
    if not math.isfinite(total) and not weight.isfinite().all():
        faults.add("the stored weight decodes to NaN or infinity")
        return LayerMeasurement(frozenset(faults))
    if source is None:
        return LayerMeasurement(frozenset(faults))

    bound = pipeline.error_bound(stored, steps, weight)
    distance = (weight - source).abs_()
    excess = distance.new_zeros(()) if bound is None else (distance - bound).amax()
    largest, error_norm, norm = _read(excess, *map(_norm, (distance, source)))
    # The largest difference is found several times as fast as each pair is compared. It is NaN
    # where any is, and NaN exceeds nothing.
    if bound is not None and not largest <= 0 and (distance > bound).any():
        faults.add("a stored weight is further from the source's than rounding can move it")
    return LayerMeasurement(frozenset(faults), error_norm**2, norm**2, bound is not None)


def _read(*numbers: torch.Tensor) -> list[float]:
    """The numbers in tensors without axes: the host waits for their device once."""
    return torch.stack([number.double() for number in numbers]).tolist()


def _norm(x: torch.Tensor) -> torch.Tensor:
    """In float64, of numbers too large to be squared in float32 too."""
    norm: torch.Tensor = torch.linalg.vector_norm(x, dtype=torch.float64)
    return norm


def _is_usable_scale(scale: torch.Tensor) -> torch.Tensor:
    scale = scale.float()
    return ((scale > 0) & scale.isfinite()).all()
