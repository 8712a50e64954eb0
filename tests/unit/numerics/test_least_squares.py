"""The best weights under a mask, and the target of a step after another, held against least squares
in float64.
"""

from __future__ import annotations

import attrs
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from bitpress import numerics
from bitpress.numerics.block_sweep import LEAF
from bitpress.schemes.values import Layer, Statistic


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(width: int, tokens: int = 600, seed: int = 1) -> torch.Tensor:
    """(tokens, in): correlated channels of unlike size."""
    mixing = torch.eye(width) + draw(width, width, seed=seed + 1) / width**0.5
    return draw(tokens, width, seed=seed) @ mixing * (draw(width, seed=seed + 2) * 0.7).exp()


def factorize(x: torch.Tensor, together: int = 1) -> numerics.Factor:
    factor = numerics.factorize_hessian(x.T @ x, len(x), together)
    assert factor is not None
    return factor


def damped_hessian(factor: numerics.Factor, width: int) -> NDArray[np.float64]:
    """The H that was factored."""
    return factor.multiply(torch.eye(width)).double().numpy()


def least_squares(
    target: torch.Tensor, hessian: NDArray[np.float64], mask: torch.Tensor
) -> NDArray[np.float64]:
    """The least (t - q) H (t - q)ᵀ on each row's support, solved by itself."""
    solution = np.zeros(target.shape)
    for row, (t, support) in enumerate(zip(target.double().numpy(), mask.numpy(), strict=True)):
        on_support = hessian[np.ix_(support, support)]
        solution[row, support] = np.linalg.solve(on_support, hessian[support] @ t)
    return solution


def test_multiplying_is_the_inverse_of_solving() -> None:
    x = inputs(300)
    factor, left = factorize(x), draw(7, 300, seed=3)
    hessian = (x.double().T @ x.double()).numpy() / len(x)
    damping = np.diag(factor.diagonal.numpy() - hessian.diagonal())
    expected = left.double().numpy() @ (hessian + damping)
    tolerance = 1e-4 * hessian.diagonal().max()
    np.testing.assert_allclose(factor.multiply(left).numpy(), expected, atol=tolerance)
    torch.testing.assert_close(factor.solve(factor.multiply(left)), left, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("together", [1, 4, 12, 48])
def test_neighbors_stay_together_the_most_active_first(together: int) -> None:
    x = inputs(48)
    order = factorize(x, together).order.view(-1, together)
    assert sorted(order.flatten().tolist()) == list(range(48))
    assert (order == order[:, :1] + torch.arange(together)).all()
    assert not (order[:, 0] % together).any()
    activity = x.square().sum(0)[order].amax(1)
    assert (activity[:-1] >= activity[1:]).all()


@pytest.mark.parametrize(("rows", "width"), [(1, 64), (5, 24), (2100, 16)])
def test_carried_on_it_comes_to_the_least_squares_solution(rows: int, width: int) -> None:
    x, target = inputs(width), draw(rows, width, seed=5)
    factor, mask = factorize(x), draw(rows, width, seed=6) > 0
    solution = target
    for _ in range(12):
        solution = numerics.masked_least_squares(solution, target, factor, mask)
    expected = least_squares(target, damped_hessian(factor, width), mask)
    np.testing.assert_allclose(solution.numpy(), expected, atol=1e-4 * np.abs(expected).max())


def test_no_row_gets_worse_and_most_of_what_can_be_gained_is_gained_at_once() -> None:
    x, target = inputs(96), draw(40, 96, seed=5)
    factor, mask = factorize(x), draw(40, 96, seed=6) > 0
    solution = numerics.masked_least_squares(target, target, factor, mask)
    best = torch.tensor(least_squares(target, damped_hessian(factor, 96), mask)).float()
    start_loss, loss, best_loss = (
        factor.loss(target - weight) for weight in (target * mask, solution, best)
    )
    assert (loss <= start_loss).all()
    assert (loss - best_loss).sum() < 0.02 * (start_loss - best_loss).sum()
    assert not solution[~mask].any()


def output_hessian(rows: int, seed: int = 11) -> torch.Tensor:
    """(blocks, block, block): what errors of a layer's outputs cost."""
    gradient = draw(3000, rows, seed=seed) @ (torch.eye(rows) + draw(rows, rows, seed=seed + 1) / 9)
    hessian = numerics.damped_output_hessian(numerics.output_statistics(gradient))
    assert hessian is not None
    return hessian


def coupled_loss(
    error: NDArray[np.float64], hessian: NDArray[np.float64], of_outputs: torch.Tensor
) -> NDArray[np.float64]:
    """tr(H_O E H Eᵀ) of each block of rows."""
    block = of_outputs.shape[1]
    losses = []
    for number, of_block in enumerate(of_outputs.double().numpy()):
        own = error[number * block : (number + 1) * block]
        losses.append(((of_block[: len(own), : len(own)] @ own @ hessian) * own).sum())
    return np.array(losses)


@pytest.mark.parametrize("rows", [24, 40], ids=["a block of rows", "one that is not full"])
def test_rows_that_make_up_for_each_other_come_to_the_solution_of_them_all(rows: int) -> None:
    x, target = inputs(16), draw(rows, 16, seed=5)
    factor, mask, of_outputs = factorize(x), draw(rows, 16, seed=6) > 0, output_hessian(rows)
    solution = target
    for _ in range(8):
        solution = numerics.masked_least_squares(solution, target, factor, mask, of_outputs)
    # all weights of all rows in one system of equations
    of_rows = of_outputs[0, :rows, :rows].numpy()
    together = np.kron(of_rows, damped_hessian(factor, 16))
    support, wanted = mask.flatten().numpy(), target.double().flatten().numpy()
    expected = np.zeros(rows * 16)
    expected[support] = np.linalg.solve(
        together[np.ix_(support, support)], together[support] @ wanted
    )
    np.testing.assert_allclose(
        solution.flatten().numpy(), expected, atol=1e-4 * np.abs(expected).max()
    )


def test_no_block_of_rows_gets_worse_where_rows_make_up_for_each_other() -> None:
    # two blocks, the second not full
    x, target = inputs(48), draw(700, 48, seed=5)
    factor, mask, of_outputs = factorize(x), draw(700, 48, seed=6) > 0, output_hessian(700)
    assert len(of_outputs) == 2
    start = numerics.masked_least_squares(target, target, factor, mask)
    solution = numerics.masked_least_squares(start, target, factor, mask, of_outputs)
    hessian = damped_hessian(factor, 48)
    start_loss, loss = (
        coupled_loss((target - weight).double().numpy(), hessian, of_outputs)
        for weight in (start, solution)
    )
    assert (loss < 0.9 * start_loss).all()
    assert not solution[~mask].any()


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e30])
def test_rows_of_any_size_stay_finite_and_a_finished_one_stays(size: float) -> None:
    x, target = inputs(32), draw(6, 32, seed=5) * size
    factor, mask = factorize(x), draw(6, 32, seed=6) > 0
    for of_outputs in (None, output_hessian(6)):
        solved = numerics.masked_least_squares(target, target, factor, mask, of_outputs)
        assert solved.isfinite().all()
    solution = draw(6, 32, seed=7) * mask
    again = numerics.masked_least_squares(solution, solution, factor, mask)
    assert torch.equal(again, solution)


@pytest.mark.parametrize("span", [4, LEAF, 4 * LEAF])
@pytest.mark.parametrize("width", [40, 200, 256])
def test_a_choice_is_made_on_what_would_be_best_after_the_columns_before_it(
    width: int, span: int
) -> None:
    x, weight = inputs(width), draw(9, width, seed=8)
    factor, best_by_start = factorize(x), {}

    def ahead(best: torch.Tensor, rows: slice, positions: slice) -> None:
        best_by_start[positions.start] = (positions, best.clone())

    projected, _ = numerics.column_sweep(
        weight, factor, lambda target, rows, column: target.round(), ahead, span
    )
    assert list(best_by_start) == list(range(0, width, span))
    weight, projected = (w[:, factor.order].double().numpy() for w in (weight, projected))
    error = weight - projected
    hessian = damped_hessian(factor, width)[np.ix_(factor.order, factor.order)]
    # the least of e H eᵀ where the first columns' errors are what they are
    for start, (positions, best) in best_by_start.items():
        inverse = np.linalg.inv(hessian[start:, start:])
        best_error = -error[:, :start] @ hessian[:start, start:] @ inverse
        expected = weight[:, positions] - best_error[:, : positions.stop - start]
        np.testing.assert_allclose(best.T.numpy(), expected, atol=2e-3)


def eight_bits(weight: torch.Tensor, importance: torch.Tensor | None) -> numerics.IntegerGrid:
    """Eight bits for each row: nearly every number."""
    return numerics.fit_symmetric(weight, importance, 8, weight.shape[1], (1.0,))


def drifted(weight: torch.Tensor) -> tuple[dict[str, Statistic], torch.Tensor]:
    """Statistics of a layer whose inputs have drifted, and the target that makes up for it."""
    reference = inputs(64, 4000)
    x = reference + 0.2 * reference.roll(1, 1)
    stats = numerics.gptq_statistics(x, weight, reference)
    factor = numerics.factorize_hessian(stats["hessian"].value, len(x))
    assert factor is not None
    return stats, numerics.gptq_target(Layer("layer", weight, torch.bfloat16), stats, factor)


def test_a_later_step_does_not_make_up_again_for_what_an_earlier_one_did() -> None:
    weight = draw(20, 64, seed=9)
    stats, target = drifted(weight)
    assert (target - weight).norm() > 0.1 * weight.norm()
    # as a first step leaves it that can store any number
    corrected = Layer("layer", target, torch.bfloat16, original_weight=weight)
    quantized, _ = numerics.gptq_quantize(corrected, stats, eight_bits)
    assert (quantized - target).norm() < 0.02 * target.norm()
    without_original = attrs.evolve(corrected, original_weight=None)
    corrected_twice, _ = numerics.gptq_quantize(without_original, stats, eight_bits)
    assert (corrected_twice - target).norm() > 0.1 * target.norm()


def test_on_a_mask_the_target_is_the_best_that_the_mask_allows() -> None:
    weight = draw(20, 64, seed=9)
    stats, target = drifted(weight)
    factor = numerics.factorize_hessian(stats["hessian"].value, 4000)
    assert factor is not None
    mask = draw(20, 64, seed=10) > 0
    best = torch.tensor(least_squares(target, damped_hessian(factor, 64), mask)).float()
    # as a first step leaves it that looked at no data
    masked = Layer("layer", weight * mask, torch.bfloat16, mask, original_weight=weight)
    quantized, _ = numerics.gptq_quantize(masked, stats, eight_bits)
    assert not quantized[~mask].any()
    start_loss, loss, best_loss = (
        factor.loss(target - q).sum() for q in (weight * mask, quantized, best)
    )
    assert loss - best_loss < 0.05 * (start_loss - best_loss)
