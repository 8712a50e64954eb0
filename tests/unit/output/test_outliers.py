"""A layer is an outlier if it fits its format much worse than the other layers of that format."""

from __future__ import annotations

from bitpress.output.manifest import LayerRecord
from bitpress.output.outliers import Outlier, find_outliers


def layer(error: float | None, rounding: float | None = None, steps: str = "a") -> LayerRecord:
    bits = 8.0 if steps == "a" else 4.125
    return LayerRecord((steps,), (64, 64), "BF16", bits, error=error, rounding_error=rounding)


def test_layers_are_held_against_those_of_the_same_format() -> None:
    layers = {f"a{i}": layer(0.01 + i / 10_000) for i in range(6)}
    layers |= {f"b{i}": layer(0.1, steps="b") for i in range(6)}
    assert find_outliers(layers) == []
    layers["a6"] = layer(0.05)
    (outlier,) = find_outliers(layers)
    assert outlier == Outlier("a6", 0.05, 0.0103)


def test_the_worst_comes_first() -> None:
    layers = {f"a{i}": layer(0.01) for i in range(9)} | {"x": layer(0.03), "y": layer(0.04)}
    assert [outlier.module for outlier in find_outliers(layers)] == ["y", "x"]


def test_weights_that_move_on_purpose_are_judged_by_plain_rounding() -> None:
    layers = {f"a{i}": layer(0.01 * (i + 1), rounding=0.01) for i in range(9)}
    assert find_outliers(layers) == []
    layers["a0"] = layer(0.01, rounding=0.03)
    assert [outlier.module for outlier in find_outliers(layers)] == ["a0"]


def test_a_few_layers_and_unmeasured_ones_say_nothing() -> None:
    assert find_outliers({"x": layer(0.5), "y": layer(0.01), "z": layer(0.01)}) == []
    assert find_outliers({f"a{i}": layer(None) for i in range(9)}) == []
    assert find_outliers({f"a{i}": layer(0.0) for i in range(9)}) == []
