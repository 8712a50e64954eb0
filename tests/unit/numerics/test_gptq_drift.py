"""What a layer is changed by before it is rounded, so that it makes up for what the layers before
it have moved.
"""

from __future__ import annotations

import functools
import gc

import numpy as np
import pytest
import torch

from bitpress import numerics
from bitpress.numerics.gptq import SAMPLE_STRIDE, TOKENS_PER_CHANNEL, drift_correction
from bitpress.schemes.values import Layer

WIDTH, ROWS = 24, 10


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def corrected(
    weight: torch.Tensor,
    now: torch.Tensor,
    before: torch.Tensor,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    stats = numerics.gptq_statistics(now, weight, before, residual)
    factor = numerics.factorize_hessian(stats["hessian"].value, len(now))
    assert factor is not None
    return weight + drift_correction(weight, stats, factor)


@pytest.mark.parametrize("streams", [False, True])
def test_of_much_data_the_correction_is_the_least_squares_solution(streams: bool) -> None:
    weight, x = draw(ROWS, WIDTH, seed=1), draw(20_000, WIDTH, seed=2)
    # as compressed layers before make it
    now = x + 0.3 * x.roll(1, 1)
    residual = 0.5 * x @ draw(WIDTH, ROWS, seed=3) if streams else None
    wanted = (x @ weight.T + (0 if residual is None else residual)).double().numpy()
    least = np.linalg.lstsq(now.double().numpy(), wanted, rcond=None)[0].T
    found = corrected(weight, now, x, residual)
    # the damping, and 8-bit sums
    np.testing.assert_allclose(found.numpy(), least, atol=0.02)
    missing = x @ weight.T - now @ weight.T + (0 if residual is None else residual)
    assert (
        x @ weight.T + (0 if residual is None else residual) - now @ found.T
    ).norm() < 0.02 * missing.norm()


@pytest.mark.parametrize("tokens", [8, 100, 3000])
def test_what_has_nothing_to_do_with_the_inputs_moves_nothing_much(tokens: int) -> None:
    weight, now = draw(ROWS, WIDTH, seed=1), draw(tokens, WIDTH, seed=2)
    noise = draw(tokens, ROWS, seed=3)
    unshrunk = np.linalg.lstsq(now.double().numpy(), noise.double().numpy(), rcond=None)[0]
    found = corrected(weight, now, now, noise) - weight
    assert found.square().sum() < 0.35 * np.square(unshrunk).sum()


def test_a_correction_generalises_better_shrunk_than_not() -> None:
    weight, x = draw(ROWS, WIDTH, seed=1), draw(TOKENS_PER_CHANNEL * WIDTH, WIDTH, seed=2)
    fresh, true = draw(4000, WIDTH, seed=4), 0.2 * draw(WIDTH, ROWS, seed=3)
    residual = x @ true + 3 * draw(len(x), ROWS, seed=5)
    unshrunk = np.linalg.lstsq(x.double().numpy(), residual.double().numpy(), rcond=None)[0]
    found = (corrected(weight, x, x, residual) - weight).T
    assert (fresh @ (found - true)).norm() < 0.9 * (
        fresh @ (torch.tensor(unshrunk).float() - true)
    ).norm()


def test_batches_add_up_to_the_same_correction() -> None:
    weight, x = draw(ROWS, WIDTH, seed=1), draw(10 * SAMPLE_STRIDE, WIDTH, seed=2)
    now, residual = x + 0.1 * draw(len(x), WIDTH, seed=3), draw(len(x), ROWS, seed=4)
    whole = numerics.gptq_statistics(now, weight, x, residual)
    halves = [
        numerics.gptq_statistics(now[part], weight, x[part], residual[part])
        for part in (slice(0, 40), slice(40, None))
    ]
    for name, stat in whole.items():
        torch.testing.assert_close(
            (halves[0][name] | halves[1][name]).value, stat.value, rtol=1e-4, atol=1e-4
        )


def test_numbers_too_large_for_float32_move_nothing() -> None:
    weight, x = draw(ROWS, WIDTH, seed=1), draw(100, WIDTH, seed=2)
    weight[3] = 1e38
    found = corrected(weight, x, x * 1.5)
    assert torch.equal(found[3], weight[3])
    assert found.isfinite().all()


def test_nothing_is_held_once_a_weight_has_been_rounded() -> None:
    weight, x = torch.randn(40, 64), torch.randn(300, 64)
    stats = numerics.gptq_statistics(x, weight, x + 0.1)
    fit = functools.partial(numerics.fit_symmetric, bits=4, group=16, ratios=(0.9, 1.0))

    def tensors() -> int:
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    layer = Layer("layer", weight, torch.bfloat16)
    # what is made once and kept is there by now
    numerics.gptq_quantize(layer, stats, fit)
    gc.collect()
    # what refers to itself in a circle stays until it is looked for, and these are large
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
    weight, x, others = (
        draw(ROWS, WIDTH, seed=1),
        scale * draw(4000, WIDTH, seed=2),
        draw(40_000, WIDTH, seed=4),
    )
    now = x + 0.3 * x.roll(1, 1)
    of_reference, of_others = (
        numerics.gptq_statistics(now, weight, x),
        numerics.gptq_statistics(others, weight),
    )
    stats = of_reference | {name: of_reference[name] | stat for name, stat in of_others.items()}
    factor = numerics.factorize_hessian(stats["hessian"].value, stats["tokens"].value.item())
    left = x @ weight.T - now @ (weight + drift_correction(weight, stats, factor)).T
    assert left.norm() <= (x @ weight.T - now @ weight.T).norm()


def test_few_tokens_for_the_width_are_believed_in_proportion() -> None:
    weight = draw(ROWS, WIDTH, seed=1)
    sizes = []
    for tokens in (TOKENS_PER_CHANNEL * WIDTH, TOKENS_PER_CHANNEL * WIDTH // 4):
        x = draw(tokens, WIDTH, seed=2)
        sizes.append((corrected(weight, x + 0.3 * x.roll(1, 1), x) - weight).norm())
    assert sizes[1] < 0.35 * sizes[0]
