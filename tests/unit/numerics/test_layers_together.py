"""Layers that are solved together become what each becomes alone, to the bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import attrs
import pytest
import torch
from fixtures.layer_problems import Fit, Problem, draw
from torch import Tensor

from bitpress import numerics
from bitpress.numerics import output_hessian, wavefront
from bitpress.runtime import batching
from bitpress.runtime.batching import map_batched
from bitpress.schemes.values import Statistic


def symmetric(weight: Tensor, importance: Tensor | None) -> Any:
    return numerics.fit_symmetric(weight, importance, 4, 8, (0.8, 1.0), dtype=torch.bfloat16)


def asymmetric(weight: Tensor, importance: Tensor | None) -> Any:
    return numerics.fit_asymmetric(weight, importance, 3, 8, (0.8, 1.0))


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
    with patch.object(wavefront, "_sweep_layers", wraps=wavefront._sweep_layers) as sweep:
        together = map_batched(lambda problem: problem.solve(fit), problems)
    assert len(sweep.call_args_list[0].args[0]) == 3
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
