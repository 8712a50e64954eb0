"""The sweep compiled by Numba is the loop over columns to the bit."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
from fixtures.layer_problems import Problem
from fixtures.ruled_grids import (
    GRIDS,
    WEIGHTS,
    assert_any_target_becomes_what_the_grid_makes_of_it,
    assert_same,
    draw,
    factorize,
    fit_stored,
)
from torch import Tensor

pytest.importorskip("numba", reason="Numba is not installed: pip install 'bitpress-core[cpu]'")

from bitpress import numerics
from bitpress.numerics import block_sweep, compiled_sweep, kernel_trial, rows, wavefront
from bitpress.runtime.batching import map_batched

# A narrow block, so that few columns make several; the loop leaves none of it to products.
BLOCK = 8
SIZES = [(5, 7), (18, 20), (40, 17)]

with_kernel = patch.object(kernel_trial, "can_compile", lambda device: True)


@pytest.fixture(autouse=True)
def the_loop_where_nothing_else_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_trial, "can_compile", lambda device: False)


@pytest.fixture
def narrow_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_sweep, "BLOCK", BLOCK)
    monkeypatch.setattr(block_sweep, "BLOCK", BLOCK)
    monkeypatch.setattr(block_sweep, "LEAF", BLOCK)


@pytest.mark.usefixtures("narrow_blocks")
@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("name", GRIDS)
def test_compiled_columns_become_what_the_loop_makes_of_them(name: str, kind: str) -> None:
    for num_rows, width in SIZES:
        weight = WEIGHTS[kind](draw(num_rows, width, num_rows) * 0.02)
        grid, factor = GRIDS[name](weight, width if width % 8 else 8), factorize(width)
        sweep = functools.partial(
            numerics.column_sweep, weight, factor, grid.nearest, rule=grid.rounding_rule
        )
        expected = sweep()
        with with_kernel:
            assert_same(sweep(), expected)


@pytest.mark.parametrize("name", GRIDS)
def test_any_target_becomes_what_the_grid_makes_of_it(name: str) -> None:
    with with_kernel:
        assert_any_target_becomes_what_the_grid_makes_of_it(name)


def fit_of(name: str) -> Callable[[Tensor, Tensor | None], numerics.Grid]:
    return lambda weight, importance: fit_stored(name, weight)


@pytest.mark.usefixtures("narrow_blocks")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("name", ["4 bits, zero points", "E2M1"])
def test_layers_become_the_same_with_masks_refitted_scales_and_rows_that_make_up_for_each_other(
    name: str, two_sided: bool, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "LOOP_ROWS", rows.ROW_TILE)
    # two tiles of rows
    problem = Problem.drawn(530, 16, 9, masked=masked, two_sided=two_sided)
    expected = problem.solve(fit_of(name))
    with (
        with_kernel,
        patch.object(compiled_sweep, "BlockSweep", wraps=compiled_sweep.BlockSweep) as kernel,
    ):
        assert_same(problem.solve(fit_of(name)), expected)
    assert kernel.called


@pytest.mark.usefixtures("narrow_blocks")
@pytest.mark.parametrize(("two_sided", "masked"), [(False, True), (True, False)])
def test_layers_together_become_what_each_becomes_alone(two_sided: bool, masked: bool) -> None:
    problems = [Problem.drawn(24, 16, seed, masked=masked, two_sided=two_sided) for seed in (1, 9)]

    def solve(problem: Problem) -> tuple[Tensor, Tensor]:
        return problem.solve(fit_of("4 bits, zero points"))

    with with_kernel:
        alone = [solve(problem) for problem in problems]
        with patch.object(
            wavefront, "_sweep_layers", side_effect=wavefront._sweep_layers
        ) as sweeps:
            together = map_batched(solve, problems)
    assert [len(call.args[0]) for call in sweeps.call_args_list[:2]] == [2, 2]
    for own, expected in zip(together, alone, strict=True):
        assert_same(own, expected)


def test_a_whole_block_of_single_columns_costs_as_much_as_leaves() -> None:
    weight, factor = draw(48, 192, 11), factorize(192)
    grid = GRIDS["4 bits"](weight, 16)
    leaves, cost = numerics.column_sweep(weight, factor, grid.nearest, rule=grid.rounding_rule)
    with with_kernel:
        whole, whole_cost = numerics.column_sweep(
            weight, factor, grid.nearest, rule=grid.rounding_rule
        )
    assert (leaves != whole).float().mean() < 1e-3
    torch.testing.assert_close(whole_cost.sum(), cost.sum(), rtol=1e-4, atol=0)


def test_a_grid_without_a_rule_is_swept_in_the_loop_and_many_rows_together() -> None:
    class OwnGrid:
        tallest = 0

        def nearest(self, target: Tensor, rows: slice, column: int) -> Tensor:
            self.tallest = max(self.tallest, len(target))
            return target.round()

        def rounded(self, weight: Tensor, rows: slice = slice(None)) -> Tensor:
            return weight.round()

    problem, grid = Problem.drawn(1100, 16, 12, masked=False, two_sided=False), OwnGrid()
    with with_kernel, patch.object(compiled_sweep, "BlockSweep") as kernel:
        rounded, _ = numerics.gptq_quantize(problem.layer, problem.statistics, lambda w, _: grid)
    assert not kernel.called
    assert grid.tallest == 1100
    assert torch.equal(rounded, rounded.round())


CPU = torch.device("cpu")


def test_the_trial_passes_here_and_fails_where_a_number_differs() -> None:
    assert kernel_trial.is_exact(compiled_sweep, CPU)
    with patch.object(compiled_sweep.BlockSweep, "decide", lambda self, wave: None):
        assert not kernel_trial.is_exact(compiled_sweep, CPU)


@pytest.mark.parametrize("problem", ["Numba needs NumPy 2.4 or less", None])
def test_where_numba_fails_the_loop_goes_on_with_one_warning(
    problem: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trial(kernels: object, device: torch.device) -> bool:
        if problem is not None:
            raise ImportError(f"{problem}\nmore")
        return False

    monkeypatch.undo()
    kernel_trial.can_compile.cache_clear()
    with (
        patch.object(kernel_trial, "is_exact", trial),
        warnings.catch_warnings(record=True) as warned,
    ):
        warnings.simplefilter("always")
        answers = [kernel_trial.can_compile(CPU) for _ in range(2)]
    kernel_trial.can_compile.cache_clear()
    assert answers == [False, False]
    assert len(warned) == 1
    assert (problem or "other numbers than torch") in str(warned[0].message)
    assert not kernel_trial.can_compile(torch.device("cuda", 0))


def test_functions_that_numba_is_told_not_to_compile_are_not_used() -> None:
    script = """
import torch
from bitpress.numerics import kernel_trial

assert not kernel_trial.can_compile(torch.device("cpu"))
"""
    ran = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"NUMBA_DISABLE_JIT": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "which takes longer: Numba on cpu: NUMBA_DISABLE_JIT is set" in ran.stderr


def test_numba_takes_no_more_memory_than_is_planned_for_it() -> None:
    script = """
import torch
from bitpress.numerics import block_sweep, kernel_trial
from bitpress.runtime.memory import resident_bytes

# what torch takes when it first computes
kernel_trial.is_exact(block_sweep, torch.device("cpu"))
before = resident_bytes()
assert kernel_trial.can_compile(torch.device("cpu"))
print(resident_bytes() - before)
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(ran.stdout) <= kernel_trial.NUMBA_BYTES
