"""The fused sweep, in Triton's interpreter, is the loop over columns to the bit."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import attrs
import pytest
import torch
from fixtures.interpreted_triton import interpret
from fixtures.layer_problems import Problem
from fixtures.ruled_grids import (
    GRIDS,
    WEIGHTS,
    FloatGrid,
    assert_any_target_becomes_what_the_grid_makes_of_it,
    assert_same,
    draw,
    factorize,
    fit_stored,
    float_grid,
    statistics,
)
from torch import Tensor

from bitpress import numerics
from bitpress.numerics import (
    block_sweep,
    fused_refit,
    fused_sweep,
    kernel_trial,
    output_hessian,
    wavefront,
)
from bitpress.numerics.scale_refit import DampedHessian, refit_scales
from bitpress.runtime.batching import map_batched
from bitpress.schemes.values import Layer

# A narrow block, so that few columns make several.
BLOCK = 8
SIZES = [(5, 7), (18, 20)]


# what numpy says of infinities and NaN, which GPUs say nothing of
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def narrow_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    interpret(monkeypatch, BLOCK)


@pytest.fixture
def with_kernel(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Called, it makes sweeps follow rules in the kernel."""
    return lambda: monkeypatch.setattr(kernel_trial, "can_fuse", lambda device: True)


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("name", GRIDS)
def test_the_kernel_gives_what_the_loop_gives(
    name: str, kind: str, with_kernel: Callable[[], None]
) -> None:
    for rows, width in SIZES:
        weight = WEIGHTS[kind](draw(rows, width, rows) * 0.02)
        grid, factor = GRIDS[name](weight, width if width % 8 else 8), factorize(width)
        # the loop, then blocks of columns in torch, then the kernel
        expected = numerics.column_sweep(weight, factor, grid.nearest)
        blocks = numerics.column_sweep(weight, factor, grid.nearest, rule=grid.rounding_rule)
        assert_same(blocks, expected)
        with patch.object(kernel_trial, "can_fuse", lambda device: True):
            result = numerics.column_sweep(weight, factor, grid.nearest, rule=grid.rounding_rule)
        assert_same(result, expected)


@pytest.mark.parametrize("name", GRIDS)
def test_any_target_becomes_what_the_grid_makes_of_it(
    name: str, with_kernel: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_sweep, "ROWS", 4096)
    with_kernel()
    assert_any_target_becomes_what_the_grid_makes_of_it(name)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("name", ["4 bits, zero points", "E2M1"])
def test_layers_become_the_same_with_masks_refitted_scales_and_rows_that_make_up_for_each_other(
    name: str, two_sided: bool, masked: bool, with_kernel: Callable[[], None]
) -> None:
    rows, width = 24, 16
    weight, stats = draw(rows, width, 9), statistics(rows, width, two_sided)
    mask = draw(rows, width, 10) > 0 if masked else None

    def quantize() -> tuple[Tensor, Tensor]:
        layer = Layer("layer", weight.clone(), torch.bfloat16, mask)
        rounded, grid = numerics.gptq_quantize(layer, stats, lambda w, _: fit_stored(name, w))
        return rounded, grid.scale

    expected = quantize()
    with_kernel()
    with patch.object(fused_sweep, "BlockSweep", wraps=fused_sweep.BlockSweep) as kernel:
        assert_same(quantize(), expected)
    assert kernel.called


@pytest.mark.parametrize(
    ("name", "two_sided", "masked"),
    [
        ("4 bits, zero points", False, True),
        ("4 bits, zero points", True, False),
        ("E2M1", True, False),
    ],
)
def test_the_kernels_make_of_layers_together_what_they_make_of_each_alone(
    name: str,
    two_sided: bool,
    masked: bool,
    with_kernel: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # every wave takes the interpreter 50 ms
    monkeypatch.setattr(output_hessian, "FEW_ROW_GROUPS", 2)

    def solve(problem: Problem) -> tuple[Tensor, Tensor]:
        return problem.solve(lambda weight, _: fit_refitted(name, weight))

    def fit_refitted(name: str, weight: Tensor) -> Any:
        return StoredFloatGrid(weight, 8) if name == "E2M1" else fit_stored(name, weight)

    problems = [Problem.drawn(5, 16, seed, masked=masked, two_sided=two_sided) for seed in (30, 40)]
    with_kernel()
    alone = [solve(problem) for problem in problems]
    sweeps, fits = [], []
    with (
        patch.object(wavefront, "_sweep_layers", note_sizes(wavefront._sweep_layers, sweeps)),
        patch.object(fused_refit, "_refit_layers", note_sizes(fused_refit._refit_layers, fits)),
    ):
        together = map_batched(solve, problems)
    assert sweeps[:2] == [2, 2]
    assert fits == [2]
    for own, expected in zip(together, alone, strict=True):
        assert_same(own, expected)


def note_sizes(compute: Callable[[Any], Any], sizes: list[int]) -> Callable[[Any], Any]:
    def noted(layers: Any) -> Any:
        sizes.append(len(layers))
        return compute(layers)

    return noted


@pytest.mark.parametrize("group", [4, 8, 24])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_scales_are_fitted_in_the_kernel_as_torch_fits_them(
    dtype: torch.dtype, group: int, with_kernel: Callable[[], None]
) -> None:
    weight, x = draw(40, 48, 13), draw(200, 48, 14) @ draw(48, 48, 15)
    hessian = DampedHessian(x.T @ x, torch.rand(48) * 48)
    grid = stored_grid(weight, group, dtype)
    target, rows = weight + 0.1 * draw(40, 48, 16), slice(1, 40, 3)
    rounded = grid.rounded(weight)
    expected = refit_scales(target[rows], rounded[rows], hessian, grid, rows)
    with_kernel()
    result = refit_scales(target[rows], rounded[rows], hessian, grid, rows)
    assert torch.equal(result, expected)
    assert not torch.equal(result, grid.scale[rows])


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_fitted_scales_can_be_stored_whatever_the_weight(
    dtype: torch.dtype, kind: str, with_kernel: Callable[[], None]
) -> None:
    weight, x = WEIGHTS[kind](draw(20, 32, 17)), draw(100, 32, 18)
    hessian = DampedHessian(x.T @ x, torch.ones(32))
    grid = stored_grid(weight, 8, dtype)
    with_kernel()
    scale = refit_scales(weight, grid.rounded(weight), hessian, grid, slice(None))
    assert torch.equal(grid.nearest_scale(scale.clone()), scale)


def stored_grid(weight: Tensor, group: int, dtype: torch.dtype) -> Any:
    """A grid whose scales are stored in that dtype."""
    if dtype is torch.float8_e4m3fn:
        return StoredFloatGrid(weight, group)
    return numerics.fit_symmetric(weight, None, 4, group, (0.8, 1.0), dtype=dtype)


class StoredFloatGrid:
    """E2M1 numbers times scales that are E4M3 numbers, divided by one for all."""

    refits = True

    def __init__(self, weight: Tensor, group: int) -> None:
        amax = numerics.absmax(weight)
        self._divisor = (256 * 6 / amax).clamp(2.0**-100, 2.0**100).masked_fill(amax == 0, 1.0)
        grid = float_grid(numerics.E2M1)(weight, group)
        self._grid = FloatGrid(self.nearest_scale(grid.scale), group, numerics.E2M1)
        self.scale, self.rounded, self.nearest = (
            self._grid.scale, self._grid.rounded, self._grid.nearest,
        )  # fmt: skip

    @property
    def rounding_rule(self) -> numerics.RoundingRule:
        return attrs.evolve(
            self._grid.rounding_rule,
            stored_scales=attrs.evolve(numerics.E4M3, lowest=2.0**-9),
            divisor=self._divisor,
        )

    def nearest_scale(self, scale: Tensor) -> Tensor:
        local = (scale * self._divisor).clamp(2.0**-9, 448.0).to(torch.float8_e4m3fn)
        return numerics.decode_e4m3(local) / self._divisor


def test_wide_blocks_cost_as_much_as_narrow_ones(with_kernel: Callable[[], None]) -> None:
    weight, factor = draw(48, 192, 11), factorize(192)
    grid = GRIDS["4 bits"](weight, 16)
    with patch.object(block_sweep, "LEAF", 16):
        narrow, cost = numerics.column_sweep(weight, factor, grid.nearest)
    with patch.object(block_sweep, "LEAF", 128):
        wide, wide_cost = numerics.column_sweep(weight, factor, grid.nearest)
    assert (narrow != wide).float().mean() < 1e-3
    torch.testing.assert_close(wide_cost.sum(), cost.sum(), rtol=1e-4, atol=0)


def test_a_grid_without_a_rule_is_swept_in_the_loop(with_kernel: Callable[[], None]) -> None:
    class OwnGrid:
        def nearest(self, target: Tensor, rows: slice, column: int) -> Tensor:
            return target.round()

        def rounded(self, weight: Tensor, rows: slice = slice(None)) -> Tensor:
            return weight.round()

    with_kernel()
    layer, stats = Layer("layer", draw(20, 24, 12), torch.bfloat16), statistics(20, 24, False)
    with patch.object(fused_sweep, "BlockSweep") as kernel:
        rounded, _ = numerics.gptq_quantize(layer, stats, lambda w, _: OwnGrid())
    assert not kernel.called
    assert torch.equal(rounded, rounded.round())


def test_the_trial_passes_here_and_fails_where_a_number_differs() -> None:
    assert kernel_trial.is_exact(fused_sweep, torch.device("cpu"))
    with patch.object(fused_sweep.BlockSweep, "decide", lambda self, wave: None):
        assert not kernel_trial.is_exact(fused_sweep, torch.device("cpu"))


@pytest.mark.parametrize("problem", ["Failed to find C compiler", None])
def test_where_triton_fails_the_loop_goes_on_with_one_warning(problem: str | None) -> None:
    def trial(kernels: object, device: torch.device) -> bool:
        if problem is not None:
            raise RuntimeError(f"{problem}\nmore")
        return False

    kernel_trial.can_fuse.cache_clear()
    with (
        patch.object(kernel_trial, "is_exact", trial),
        warnings.catch_warnings(record=True) as warned,
    ):
        answers = [kernel_trial.can_fuse(torch.device("cuda", 0)) for _ in range(2)]
    kernel_trial.can_fuse.cache_clear()
    assert answers == [False, False]
    assert len(warned) == 1
    assert (problem or "other numbers than torch") in str(warned[0].message)
    assert not kernel_trial.can_fuse(torch.device("cpu"))


# Kernels are bound to their arguments and compiled, and not launched.
COMPILE = """
import functools
import sys
import attrs
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from bitpress import numerics
from bitpress.numerics import fused_refit, fused_sweep
from bitpress.numerics.scale_refit import DampedHessian
from bitpress.numerics.swept_columns import SweptColumns

class Driver:
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", int(sys.argv[1]), 32))

class Compiled:
    def __init__(self, kernel):
        self.kernel, self.made = kernel, {}

    def __getitem__(self, grid):
        return functools.partial(self.compile, grid=grid)

    def compile(self, *args, **kwargs):
        made = self.kernel.warmup(*args, **kwargs)
        self.made[made.hash] = made.asm["ptx"]

driver.set_active(Driver())
sweep = fused_sweep._decide = Compiled(fused_sweep._decide)
refit = fused_refit._refit = Compiled(fused_refit._refit)
for rows, width, own in ((64, 256, slice(0, 64)), (70, 300, slice(3, 70, 16)), (1, 1, slice(0, 1))):
    weight, size = torch.randn(rows, width), width if width % 4 else 4
    mask = torch.ones(width, rows, dtype=torch.bool).T
    for zeros in (False, True):
        fit = numerics.fit_asymmetric if zeros else numerics.fit_symmetric
        grid = fit(weight, None, 4, size, (1.0,), dtype=torch.bfloat16)
        rules = [attrs.evolve(grid.rounding_rule, mask=m).of_rows(own) for m in (None, mask)]
        order, num_groups = torch.arange(width), min(16, len(weight[own]))
        columns = SweptColumns.undecided([weight[own]], [order], fused_sweep.BLOCK, num_groups)
        for rule in rules:
            blocks = fused_sweep.BlockSweep(columns, torch.eye(width)[None], [rule])
            for wave in columns.waves:
                blocks.decide(wave)
        for divisor in (None, torch.tensor(2.0)):
            rule, residual = attrs.evolve(rules[0], divisor=divisor), weight[own].contiguous()
            hessian = DampedHessian(torch.eye(width), torch.ones(width))
            fused_refit.refit_groups(residual.unflatten(1, (-1, size)), residual, hessian, rule)
print(len(sweep.made), len(refit.made))
print(*sweep.made.values(), *refit.made.values())
"""


@pytest.mark.parametrize("capability", [80, 90])
def test_few_kernels_are_compiled_for_all_layers_with_exact_divisions(
    capability: int, tmp_path: Path
) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    script = tmp_path / "compile_kernel.py"
    script.write_text(COMPILE)
    ran = subprocess.run(
        [sys.executable, script, str(capability)],
        capture_output=True,
        text=True,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    # with zero points and masks or without; with a divisor or without, for two sizes of groups
    assert ran.stdout.startswith("4 4\n")
    assert "div.rn.f32" in ran.stdout
    for inexact in ("div.full", "div.approx", "rcp.", "ftz", "mul.f32", "add.f32"):
        assert inexact not in ran.stdout
