"""The best weights on given places, and what a step after another aims at, held against least
squares in float64.
"""

from __future__ import annotations

import attrs
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from bitpress import numerics
from bitpress.numerics.columns import LEAF
from bitpress.schemes.values import Layer, Statistic


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(width: int, tokens: int = 600, seed: int = 1) -> torch.Tensor:
    """(tokens, in): alike in parts, unlike in size."""
    mixed = draw(tokens, width, seed=seed) @ (
        torch.eye(width) + draw(width, width, seed=seed + 1) / width**0.5
    )
    return mixed * (draw(width, seed=seed + 2) * 0.7).exp()


def factored(x: torch.Tensor, together: int = 1) -> numerics.Factor:
    found = numerics.factorize_hessian(x.T @ x, len(x), together)
    assert found is not None
    return found


def damped(factor: numerics.Factor, width: int) -> NDArray[np.float64]:
    """The H that was factored."""
    return factor.multiply(torch.eye(width)).double().numpy()


def least_squares(
    target: torch.Tensor, hessian: NDArray[np.float64], keep: torch.Tensor
) -> NDArray[np.float64]:
    """The least (t - q) H (t - q)ᵀ on each row's support, solved by itself."""
    found = np.zeros(target.shape)
    for row, (t, mask) in enumerate(zip(target.double().numpy(), keep.numpy(), strict=True)):
        found[row, mask] = np.linalg.solve(hessian[np.ix_(mask, mask)], hessian[mask] @ t)
    return found


def test_multiplying_is_the_inverse_of_solving() -> None:
    x = inputs(300)
    factor, left = factored(x), draw(7, 300, seed=3)
    hessian = (x.double().T @ x.double()).numpy() / len(x)
    np.testing.assert_allclose(
        factor.multiply(left).numpy(),
        left.double().numpy() @ (hessian + np.diag(factor.diagonal.numpy() - hessian.diagonal())),
        atol=1e-4 * hessian.diagonal().max(),
    )
    torch.testing.assert_close(factor.solve(factor.multiply(left)), left, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("together", [1, 4, 12, 48])
def test_neighbors_stay_together_the_most_active_first(together: int) -> None:
    x = inputs(48)
    order = factored(x, together).order.view(-1, together)
    assert sorted(order.flatten().tolist()) == list(range(48))
    assert (order == order[:, :1] + torch.arange(together)).all()
    assert not (order[:, 0] % together).any()
    most = x.square().sum(0)[order].amax(1)
    assert (most[:-1] >= most[1:]).all()


@pytest.mark.parametrize(("rows", "width"), [(1, 64), (5, 24), (2100, 16)])
def test_carried_on_it_comes_to_the_least_squares_solution(rows: int, width: int) -> None:
    x, target = inputs(width), draw(rows, width, seed=5)
    factor, keep = factored(x), draw(rows, width, seed=6) > 0
    found = target
    for _ in range(12):
        found = numerics.masked_least_squares(found, target, factor, keep)
    expected = least_squares(target, damped(factor, width), keep)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-4 * np.abs(expected).max())


def test_no_row_gets_worse_and_most_of_what_can_be_gained_is_gained_at_once() -> None:
    x, target = inputs(96), draw(40, 96, seed=5)
    factor, keep = factored(x), draw(40, 96, seed=6) > 0
    before, once = target * keep, numerics.masked_least_squares(target, target, factor, keep)
    best = torch.tensor(least_squares(target, damped(factor, 96), keep)).float()
    losses = [factor.loss(target - weight) for weight in (before, once, best)]
    assert (losses[1] <= losses[0]).all()
    assert (losses[1] - losses[2]).sum() < 0.02 * (losses[0] - losses[2]).sum()
    assert not once[~keep].any()


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e30])
def test_rows_of_any_size_stay_finite_and_a_finished_one_stays(size: float) -> None:
    x, target = inputs(32), draw(6, 32, seed=5) * size
    factor, keep = factored(x), draw(6, 32, seed=6) > 0
    assert numerics.masked_least_squares(target, target, factor, keep).isfinite().all()
    done = draw(6, 32, seed=7) * keep
    assert torch.equal(numerics.masked_least_squares(done, done, factor, keep), done)


@pytest.mark.parametrize("span", [4, LEAF, 4 * LEAF])
@pytest.mark.parametrize("width", [40, 200, 256])
def test_a_choice_is_made_on_what_would_be_best_after_the_columns_before_it(
    width: int, span: int
) -> None:
    x, weight = inputs(width), draw(9, width, seed=8)
    factor, seen = factored(x), {}

    def ahead(free: torch.Tensor, rows: slice, places: slice) -> None:
        seen[places.start] = (places, free.clone())

    found, _ = numerics.column_sweep(
        weight, factor, lambda target, rows, column: target.round(), ahead, span
    )
    assert list(seen) == list(range(0, width, span))
    error, hessian = (weight - found)[:, factor.order].double().numpy(), damped(factor, width)
    hessian = hessian[np.ix_(factor.order, factor.order)]
    # the least of e H eᵀ where the first columns' errors are what they are
    for start, (places, free) in seen.items():
        best = -error[:, :start] @ hessian[:start, start:] @ np.linalg.inv(hessian[start:, start:])
        expected = (
            weight[:, factor.order][:, places].double().numpy() - best[:, : places.stop - start]
        )
        np.testing.assert_allclose(free.T.numpy(), expected, atol=2e-3)


# --- a step after another
# ----------------------------------------------------------------------


def fine(weight: torch.Tensor, importance: torch.Tensor | None) -> numerics.IntegerGrid:
    """Eight bits for each row: nearly every number."""
    return numerics.fit_symmetric(weight, importance, 8, weight.shape[1], (1.0,))


def stats_of(weight: torch.Tensor, moved: float = 0.2) -> tuple[dict[str, Statistic], torch.Tensor]:
    """Statistics of a layer whose inputs have drifted, and the damped H's factor's least squares
    target.
    """
    before = inputs(64, 4000)
    now = before + moved * before.roll(1, 1)
    stats = numerics.gptq_statistics(now, weight, before)
    factor = numerics.factorize_hessian(stats["hessian"].value, len(now))
    assert factor is not None
    return stats, numerics.gptq_target(Layer("layer", weight, torch.bfloat16), stats, factor)


def test_a_later_step_does_not_make_up_again_for_what_an_earlier_one_did() -> None:
    weight = draw(20, 64, seed=9)
    stats, wanted = stats_of(weight)
    # by a step that could store any number
    corrected = Layer("layer", wanted, torch.bfloat16, original_weight=weight)
    found, _ = numerics.gptq_quantize(corrected, stats, fine)
    assert (wanted - weight).norm() > 0.1 * weight.norm()
    assert (found - wanted).norm() < 0.02 * wanted.norm()
    again, _ = numerics.gptq_quantize(attrs.evolve(corrected, original_weight=None), stats, fine)
    assert (again - wanted).norm() > 0.1 * wanted.norm()


def test_on_a_mask_the_aim_is_the_best_that_the_mask_allows() -> None:
    weight = draw(20, 64, seed=9)
    stats, wanted = stats_of(weight)
    factor = numerics.factorize_hessian(stats["hessian"].value, 4000)
    assert factor is not None
    keep = draw(20, 64, seed=10) > 0
    best = torch.tensor(least_squares(wanted, damped(factor, 64), keep)).float()
    # by a step that looked at no data
    masked = Layer("layer", weight * keep, torch.bfloat16, keep, original_weight=weight)
    found, _ = numerics.gptq_quantize(masked, stats, fine)
    assert not found[~keep].any()
    losses = [factor.loss(wanted - q).sum() for q in (weight * keep, found, best)]
    assert losses[1] - losses[2] < 0.05 * (losses[0] - losses[2])
