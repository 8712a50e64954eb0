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
    for suffix, tensor in stored.tensors.items():
        is_scale = "scale" in suffix and tensor.is_floating_point()
        if is_scale and not _is_usable_scale(tensor.float()):
            faults.add(f"{suffix} has a scale that is zero, infinite or NaN")

    # a finite sum has finite terms, and is found several times as fast
    if not math.isfinite(weight.sum()) and not weight.isfinite().all():
        faults.add("the stored weight decodes to NaN or infinity")
        return LayerMeasurement(frozenset(faults))
    if source is None:
        return LayerMeasurement(frozenset(faults))

    bound = pipeline.error_bound(stored, steps, weight)
    distance = (weight - source).abs_()
    if bound is not None and _exceeds(distance, bound):
        faults.add("a stored weight is further from the source's than rounding can move it")
    return LayerMeasurement(
        frozenset(faults), _sum_squares(distance), _sum_squares(source), bound is not None
    )


def _sum_squares(x: torch.Tensor) -> float:
    """The sum in float64, of squares too large for float32 too."""
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2


def _exceeds(distance: torch.Tensor, bound: torch.Tensor) -> bool:
    """Whether any distance is larger than its bound."""
    # The largest difference is found several times as fast as each pair is compared. It is NaN
    # where any is, and NaN exceeds nothing.
    if (distance - bound).amax() <= 0:
        return False
    return bool((distance > bound).any())


def _is_usable_scale(scale: torch.Tensor) -> bool:
    return bool(((scale > 0) & scale.isfinite()).all())
