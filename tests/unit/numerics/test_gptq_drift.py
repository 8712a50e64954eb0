"""How a layer is changed before it is rounded, to make up for the drift of its inputs."""

from __future__ import annotations

import functools
import gc
import warnings
from unittest.mock import patch

import numpy as np
import pytest
import torch

from bitpress import numerics
from bitpress.numerics import gptq
from bitpress.numerics.gptq import (
    MAX_CORRECTION,
    SAMPLE_STRIDE,
    TOKENS_PER_CHANNEL,
    drift_correction,
)
from bitpress.schemes.values import Layer

WIDTH, ROWS = 24, 10
# outputs so few that the drift of inputs is projected to them, and more
NUMBERS_OF_ROWS = [ROWS, 2 * WIDTH]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correct_weight(
    weight: torch.Tensor,
    inputs: torch.Tensor,
    reference: torch.Tensor,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    stats = numerics.gptq_statistics(inputs, weight, reference, residual)
    factor = numerics.factorize_hessian(stats["hessian"].value, len(inputs))
    assert factor is not None
    return weight + drift_correction(weight, stats, factor)


@pytest.mark.parametrize("rows", NUMBERS_OF_ROWS)
@pytest.mark.parametrize("has_residual", [False, True])
def test_of_much_data_the_correction_is_the_least_squares_solution(
    has_residual: bool, rows: int
) -> None:
    weight, x = draw(rows, WIDTH, seed=1), draw(20_000, WIDTH, seed=2)
    # as the compressed layers before make it
    inputs = x + 0.3 * x.roll(1, 1)
    residual = 0.3 * x @ draw(WIDTH, rows, seed=3) if has_residual else torch.zeros(len(x), rows)
    target = x @ weight.T + residual
    expected = np.linalg.lstsq(inputs.double().numpy(), target.double().numpy(), rcond=None)[0].T
    corrected = correct_weight(weight, inputs, x, residual if has_residual else None)
    # the damping, and 8-bit sums
    np.testing.assert_allclose(corrected.numpy(), expected, atol=0.02)
    error_before, error_after = target - inputs @ weight.T, target - inputs @ corrected.T
    assert error_after.norm() < 0.02 * error_before.norm()


@pytest.mark.parametrize("has_residual", [False, True])
def test_projected_inputs_give_the_correction_that_inputs_give(has_residual: bool) -> None:
    weight, x = draw(ROWS, WIDTH, seed=1), draw(20_000, WIDTH, seed=2)
    inputs = x + 0.3 * x.roll(1, 1)
    residual = 0.3 * x @ draw(WIDTH, ROWS, seed=3) if has_residual else None
    projected = correct_weight(weight, inputs, x, residual)
    with patch.object(gptq, "has_few_outputs", lambda rows, width: False):
        expected = correct_weight(weight, inputs, x, residual)
    # 8-bit codes of other numbers, and E[e²] of all tokens instead of a sample
    torch.testing.assert_close(projected, expected, rtol=0, atol=0.002)


def test_a_row_moves_little_where_inputs_hardly_go() -> None:
    weight, x = draw(ROWS, WIDTH, seed=1), draw(20_000, WIDTH, seed=2)
    x[:, 0] *= 0.03
    missing = torch.zeros(ROWS, WIDTH)
    # an output so far off that the faint channel's weight would have to move by its row's norm
    missing[:, 0], missing[:, 1] = 1.2 * weight.norm(dim=1), 0.1 * weight.norm(dim=1)
    residual = x @ missing.T
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        correction = correct_weight(weight, x, x, residual) - weight
    assert (correction.norm(dim=1) <= MAX_CORRECTION * weight.norm(dim=1)).all()
    error = residual - x @ correction.T
    assert (error.norm(dim=0) < 0.3 * residual.norm(dim=0)).all()


def test_a_row_that_would_move_too_far_is_left_alone_with_a_warning() -> None:
    weight, x = draw(ROWS, WIDTH, seed=1), draw(20_000, WIDTH, seed=2)
    residual = 1e-3 * x @ draw(WIDTH, ROWS, seed=3)
    residual[:, :3] *= 1e6
    with pytest.warns(UserWarning, match=f"3 of its {ROWS} rows would move by more than"):
        moved = (correct_weight(weight, x, x, residual) - weight).norm(dim=1)
    assert (moved[:3] == 0).all()
    assert (moved[3:] > 0).all()


def test_where_nothing_has_drifted_nothing_is_moved_or_warned_of() -> None:
    weight, x = draw(ROWS, WIDTH, seed=1), draw(200, WIDTH, seed=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(correct_weight(weight, x, x), weight)


@pytest.mark.parametrize("tokens", [8, 100, 3000])
def test_what_has_nothing_to_do_with_the_inputs_moves_nothing_much(tokens: int) -> None:
    weight, x = draw(ROWS, WIDTH, seed=1), draw(tokens, WIDTH, seed=2)
    noise = draw(tokens, ROWS, seed=3)
    unshrunk = np.linalg.lstsq(x.double().numpy(), noise.double().numpy(), rcond=None)[0]
    correction = correct_weight(weight, x, x, noise) - weight
    assert correction.square().sum() < 0.35 * np.square(unshrunk).sum()


def test_a_correction_generalizes_better_shrunk_than_not() -> None:
    weight, x = draw(ROWS, WIDTH, seed=1), draw(TOKENS_PER_CHANNEL * WIDTH, WIDTH, seed=2)
    fresh, true = draw(4000, WIDTH, seed=4), 0.2 * draw(WIDTH, ROWS, seed=3)
    residual = x @ true + 3 * draw(len(x), ROWS, seed=5)
    unshrunk = np.linalg.lstsq(x.double().numpy(), residual.double().numpy(), rcond=None)[0]
    correction = (correct_weight(weight, x, x, residual) - weight).T
    error = fresh @ (correction - true)
    error_unshrunk = fresh @ (torch.tensor(unshrunk).float() - true)
    assert error.norm() < 0.9 * error_unshrunk.norm()


@pytest.mark.parametrize("rows", NUMBERS_OF_ROWS)
def test_batches_add_up_to_the_same_correction(rows: int) -> None:
    weight, x = draw(rows, WIDTH, seed=1), draw(10 * SAMPLE_STRIDE, WIDTH, seed=2)
    inputs, residual = x + 0.1 * draw(len(x), WIDTH, seed=3), draw(len(x), rows, seed=4)
    whole = numerics.gptq_statistics(inputs, weight, x, residual)
    first, second = (
        numerics.gptq_statistics(inputs[half], weight, x[half], residual[half])
        for half in (slice(0, 40), slice(40, None))
    )
    assert ("cross_moment" in whole) == (rows == ROWS)
    for name, stat in whole.items():
        merged = (first[name] | second[name]).value
        torch.testing.assert_close(merged, stat.value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", NUMBERS_OF_ROWS)
def test_numbers_too_large_for_float32_move_nothing(rows: int) -> None:
    weight, x = draw(rows, WIDTH, seed=1), draw(100, WIDTH, seed=2)
    weight[3] = 1e38
    corrected = correct_weight(weight, x, x * 1.5)
    assert torch.equal(corrected[3], weight[3])
    assert corrected.isfinite().all()


def test_nothing_is_held_once_a_weight_has_been_rounded() -> None:
    weight, x = torch.randn(40, 64), torch.randn(300, 64)
    stats = numerics.gptq_statistics(x, weight, x + 0.1)
    fit = functools.partial(numerics.fit_symmetric, bits=4, group=16, ratios=(0.9, 1.0))

    def tensors() -> int:
        return sum(issubclass(type(item), torch.Tensor) for item in gc.get_objects())

    layer = Layer("layer", weight, torch.bfloat16)
    # fills the caches
    numerics.gptq_quantize(layer, stats, fit)
    gc.collect()
    # reference cycles would stay until the collector runs, and these tensors are large
    gc.disable()
    try:
        before = tensors()
        numerics.gptq_quantize(layer, stats, fit)
        assert tensors() == before
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "scale", [1.0, 4.0], ids=["tokens like the others", "tokens that are larger than the others"]
)
def test_a_correction_never_takes_away_more_than_is_missing(scale: float) -> None:
    weight, x = draw(ROWS, WIDTH, seed=1), scale * draw(4000, WIDTH, seed=2)
    inputs, other_inputs = x + 0.3 * x.roll(1, 1), draw(40_000, WIDTH, seed=4)
    stats = numerics.gptq_statistics(inputs, weight, x)
    for name, stat in numerics.gptq_statistics(other_inputs, weight).items():
        stats[name] = stats[name] | stat
    factor = numerics.factorize_hessian(stats["hessian"].value, stats["tokens"].value.item())
    new_weight = weight + drift_correction(weight, stats, factor)
    error_before = x @ weight.T - inputs @ weight.T
    assert (x @ weight.T - inputs @ new_weight.T).norm() <= error_before.norm()


def test_few_tokens_for_the_width_are_believed_in_proportion() -> None:
    weight = draw(ROWS, WIDTH, seed=1)
    sizes = []
    for tokens in (TOKENS_PER_CHANNEL * WIDTH, TOKENS_PER_CHANNEL * WIDTH // 4):
        x = draw(tokens, WIDTH, seed=2)
        sizes.append((correct_weight(weight, x + 0.3 * x.roll(1, 1), x) - weight).norm())
    assert sizes[1] < 0.35 * sizes[0]


@pytest.mark.parametrize(("tokens", "is_corrected"), [(37, False), (38, False), (39, True)])
def test_of_too_few_tokens_for_the_width_no_correction_is_computed(
    tokens: int, is_corrected: bool
) -> None:
    # a tenth of the tokens with which a correction is believed in full are 38.4
    weight, x = draw(ROWS, WIDTH, seed=1), draw(tokens, WIDTH, seed=2)
    stats = numerics.gptq_statistics(x + 0.3 * x.roll(1, 1), weight, x)
    factor = numerics.factorize_hessian(stats["hessian"].value, tokens)
    assert factor is not None
    target = gptq.gptq_target(Layer("layer", weight, torch.bfloat16), stats, factor)
    assert torch.equal(target, weight) != is_corrected
