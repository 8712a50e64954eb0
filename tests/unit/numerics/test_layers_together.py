"""Layers that are solved together become what each becomes alone, to the bit."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import attrs
import pytest
import torch
from fixtures.layer_problems import Fit, Problem, draw
from torch import Tensor

from bitpress import numerics
from bitpress.numerics import hessian, output_hessian, scale_search, wavefront
from bitpress.runtime import batching
from bitpress.runtime.batching import map_batched
from bitpress.schemes.values import Statistic


def symmetric(weight: Tensor, importance: Tensor | None) -> Any:
    return numerics.fit_symmetric(weight, importance, 4, 8, (0.8, 1.0), dtype=torch.bfloat16)


def asymmetric(weight: Tensor, importance: Tensor | None) -> Any:
    return numerics.fit_asymmetric(weight, importance, 3, 8, (0.8, 1.0))


# what has a batch axis in every problem
COMPUTED_TOGETHER = [
    (hessian, "_factorize_layers"),
    (scale_search, "_search_layers"),
    (wavefront, "_sweep_layers"),
]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("fit", [symmetric, asymmetric])
@pytest.mark.parametrize(("rows", "width"), [(1, 8), (40, 136), (530, 64), (96, 320)])
def test_layers_become_together_what_each_becomes_alone(
    rows: int, width: int, fit: Fit, two_sided: bool, masked: bool
) -> None:
    problems = [
        Problem.drawn(rows, width, seed, masked=masked, two_sided=two_sided)
        for seed in (10, 20, 30)
    ]
    alone = [problem.solve(fit) for problem in problems]
    with ExitStack() as spies:
        computed = [
            spies.enter_context(patch.object(module, name, wraps=getattr(module, name)))
            for module, name in COMPUTED_TOGETHER
        ]
        together = map_batched(lambda problem: problem.solve(fit), problems)
    assert [len(compute.call_args_list[0].args[0]) for compute in computed] == [3, 3, 3]
    for own, expected in zip(together, alone, strict=True):
        assert all(map(torch.equal, own, expected))


@pytest.mark.parametrize("masked", [False, True])
def test_a_device_is_waited_for_as_often_for_several_layers_as_for_one(masked: bool) -> None:
    problems = [Problem.drawn(40, 64, s, masked=masked, two_sided=True) for s in (10, 20, 30)]
    waits = []
    for together in (problems[:1], problems):
        with patch.object(batching, "_read_numbers", wraps=batching._read_numbers) as read:
            map_batched(lambda problem: problem.solve(symmetric), together)
        waits.append(read.call_count)
        assert {len(call.args[0]) for call in read.call_args_list} == {len(together)}
    assert waits[0] == waits[1]


@pytest.mark.parametrize("fit", [symmetric, asymmetric])
def test_no_numbers_of_the_host_are_copied_to_a_device_while_layers_are_solved(fit: Fit) -> None:
    problems = [Problem.drawn(40, 64, s, masked=False, two_sided=True) for s in (10, 20)]
    # tables are copied once
    expected = map_batched(lambda problem: problem.solve(fit), problems)
    # torch waits for a GPU to which it copies them
    with patch.object(Tensor, "new_tensor", side_effect=AssertionError):
        again = map_batched(lambda problem: problem.solve(fit), problems)
    for own, other in zip(again, expected, strict=True):
        assert all(map(torch.equal, own, other))


def test_layers_of_several_forms_become_together_what_each_becomes_alone() -> None:
    kinds: Sequence[tuple[int, int, bool, bool]] = [
        (40, 64, False, True),
        (24, 64, False, True),
        (40, 64, True, True),
        (40, 64, False, False),
        (40, 64, False, True),
        (40, 32, False, True),
    ]
    problems = [
        Problem.drawn(rows, width, 10 * seed, masked=masked, two_sided=two_sided)
        for seed, (rows, width, masked, two_sided) in enumerate(kinds)
    ]
    # rounded to nearest: what cannot be factored
    problems.append(
        attrs.evolve(problems[0], statistics={**problems[0].statistics, **BROKEN_STATISTICS})
    )
    with pytest.warns(UserWarning, match="not finite"):
        alone = [problem.solve(symmetric) for problem in problems]
    with pytest.warns(UserWarning, match="not finite"):
        together = map_batched(lambda problem: problem.solve(symmetric), problems)
    for own, expected in zip(together, alone, strict=True):
        assert all(map(torch.equal, own, expected))


BROKEN_STATISTICS = {"hessian": Statistic(torch.full((64, 64), torch.nan), "sum")}


@pytest.mark.parametrize("together", [1, 4])
def test_moments_are_factored_together_as_alone_however_much_damping_each_needs(
    together: int,
) -> None:
    width = 32
    moments = draw(3 * width, width, 1)
    # an eigenvalue that is below zero after the first damping, and one that stays there
    needs_more, indefinite = (hessian_with(width, least) for least in (-0.05, -1e4))
    layers = [
        (moments.T @ moments, 96.0),
        (needs_more, 100.0),
        (torch.full((width, width), torch.inf), 96.0),
        (indefinite, 100.0),
        (torch.zeros(width, width), 0.0),
        (moments.T @ moments, 7.0),
    ]

    def factorize(layer: tuple[Tensor, float]) -> numerics.Factor | None:
        return numerics.factorize_hessian(*layer, together)

    alone = [factorize(layer) for layer in layers]
    assert [factor is None for factor in alone] == [False, False, True, True, False, False]
    for own, expected in zip(map_batched(factorize, layers), alone, strict=True):
        if own is None or expected is None:
            assert own is expected
        else:
            names = ("order", "unit", "variance", "diagonal")
            assert all(torch.equal(getattr(own, n), getattr(expected, n)) for n in names)


def hessian_with(width: int, least: float) -> Tensor:
    """Moments of 100 tokens with a negative eigenvalue."""
    basis, _ = torch.linalg.qr(draw(width, width, 9))
    values = torch.ones(width)
    values[0] = least
    return 100 * (basis * values) @ basis.T


@pytest.mark.parametrize("weights_together", [1, 50, 700, 1 << 20])
@pytest.mark.parametrize("has_importance", [False, True])
@pytest.mark.parametrize("has_kinds", [False, True])
def test_scales_are_searched_together_as_alone_however_many_weights_are_looked_up_at_a_time(
    weights_together: int, has_importance: bool, has_kinds: bool
) -> None:
    group, rows, width = 8, 5, 48
    table = draw(2 * 64, 6, 0).abs().view(2, 64, 6)
    layers = []
    for seed in (10, 20, 30, 40):
        weight = draw(rows, width, seed)
        importance = draw(1, width, seed + 1).abs().squeeze(0) if has_importance else None
        span = weight.view(rows, -1, group).abs().amax(2)
        kind = draw(rows, width // group, seed + 2) > 0 if has_kinds else None
        layers.append((weight, importance, span, kind))

    def search(layer: tuple[Tensor, Tensor | None, Tensor, Tensor | None]) -> Tensor:
        weight, importance, span, kind = layer
        return numerics.search_scales(weight, importance, group, table, span, kind=kind)

    alone = [search(layer) for layer in layers]
    assert len(torch.cat(alone).unique()) == 6
    with patch.object(scale_search, "WEIGHTS_PER_CHUNK", weights_together):
        together = map_batched(search, layers)
    assert all(map(torch.equal, together, alone))


def test_of_layers_together_only_those_have_a_row_factor_whose_gradients_can_be_factored() -> None:
    gradient = draw(300, 16, 1) @ draw(16, 16, 2)
    known = numerics.output_statistics(gradient)
    alone = numerics.factorize_output_hessian(known)
    assert alone is not None
    unrelated = torch.eye(*known["output_hessian"].value.shape)
    # more than its diagonal allows
    indefinite = unrelated.clone()
    indefinite[0, 1] = indefinite[1, 0] = 9.0
    layers = [known, *(replace_hessian(known, hessian) for hessian in (unrelated, indefinite))]
    with patch.object(output_hessian, "_couple_rows", wraps=output_hessian._couple_rows) as couple:
        factors = map_batched(numerics.factorize_output_hessian, [*layers, known])
    assert couple.call_count == 1
    assert [factor is not None for factor in factors] == [True, False, False, True]
    for factor in (factors[0], factors[3]):
        assert factor is not None
        assert torch.equal(factor.coupling, alone.coupling)


def replace_hessian(statistics: dict[str, Statistic], hessian: Tensor) -> dict[str, Statistic]:
    return statistics | {"output_hessian": Statistic(hessian, "sum", rows=True)}
