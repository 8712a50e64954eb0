"""Launches of kernels for error feedback on one block of a model, with torch's operators alone and
with kernels in Triton.

    python benchmarks/launches.py [--hidden N] [--intermediate N] [--kv N] [--experts N]

They are counted on a CPU, and not measured on a GPU: every operator of torch that computes is taken
for one launch, views for none. Of a layer, the number depends on how often some of its rows are
decided, and is linear in its width: it is counted for two widths. Operators that let the host wait
for a number are counted by themselves.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from bitpress import Layer, numerics
from bitpress.numerics import kernel_trial, rows as rows_module
from bitpress.numerics.gptq import Fit
from bitpress_nvfp4 import scales

# Widths at which a layer is counted.
WIDTHS = (512, 1024)
# Of the layer: any number of them that has all groups.
ROWS = 64
# From gradients of so many tokens, rows are decided in 16 groups.
GRADIENT_TOKENS = 8192
# Operators that copy one number to the host.
WAITS = ("aten::_local_scalar_dense", "aten::equal")
# A number of the host becomes a tensor there.
FREE = ("aten::empty", "aten::new_empty", "aten::scalar_tensor")

FITS: Mapping[str, Fit[Any]] = {
    "w4a16": lambda w, importance: numerics.fit_symmetric(
        w, importance, 4, 128, (0.9, 1.0), dtype=torch.bfloat16
    ),
    "int8": lambda w, importance: numerics.fit_symmetric(w, importance, 8, w.shape[1], (0.9, 1.0)),
    "nvfp4": lambda w, importance: scales.fit(w, importance, torch.tensor(100.0)),
}


class Launches(TorchDispatchMode):
    """While it lasts, counts operators that compute."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = [value.alias_info for value in func._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in returned)
        if not is_view and not func._schema.name.startswith(FREE):
            self.counts[func._schema.name] += 1
        return func(*args, **(kwargs or {}))

    @property
    def waits(self) -> int:
        """How often the host waits for a number."""
        return sum(self.counts[name] for name in WAITS)

    @property
    def launches(self) -> int:
        """How many kernels are started."""
        return self.counts.total() - self.waits


@contextlib.contextmanager
def kernels(counts: collections.Counter[str]) -> Iterator[None]:
    """Kernels in Triton are counted and not run: rounding to nearest takes their place."""
    from bitpress.numerics import fused_refit, fused_sweep

    def decide(sweep: Any, wave: Any) -> None:
        counts["kernel"] += 1
        columns = sweep._columns
        with _disable_current_modes():
            target = columns.of_wave(columns.target, wave)
            columns.of_wave(columns.projected, wave).copy_(target * 0.99)
            columns.of_wave(columns.error, wave).copy_(target * 0.01)

    def refit_groups(units: Tensor, residual: Tensor, hessian: Any, rule: Any) -> Tensor:
        # a copy, and of each group a product and a kernel
        counts["kernel"] += 1 + 2 * units.shape[1]
        with _disable_current_modes():
            return rule.scale * 1.01

    with (
        patch.object(kernel_trial, "can_fuse", lambda device: True),
        patch.object(fused_sweep.BlockSweep, "decide", decide),
        patch.object(fused_refit, "refit_groups", refit_groups),
    ):
        yield


def count(fit: Fit[Any], width: int, is_fused: bool) -> tuple[int, int]:
    """Launches and waits for a layer whose rows are decided once, in groups."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(ROWS, width, generator=draw) * 0.02
    stats = numerics.gptq_statistics(torch.randn(width, width, generator=draw), weight)
    stats |= numerics.output_statistics(torch.randn(GRADIENT_TOKENS, ROWS, generator=draw))
    with (
        # as on a GPU
        patch.object(numerics.Factor, "covers", lambda self, cost, error: cost <= self.loss(error)),
        Launches() as seen,
        kernels(seen.counts) if is_fused else contextlib.nullcontext(),
    ):
        numerics.gptq_quantize(Layer("layer", weight, torch.bfloat16), stats, fit)
    return seen.launches, seen.waits


def of_block(
    fit: Fit[Any],
    stacks: Mapping[str, tuple[int, int, int]],
    is_fused: bool,
    tile: Callable[[int], int],
) -> tuple[int, int]:
    """Launches and waits for a block.

    Args:
        stacks: (out, in) of the layers that are solved together, and how many such stacks a block
            has.
        tile: from a width to the rows of a layer that are decided together.
    """
    (narrow, narrow_waits), (wide, waits) = (count(fit, width, is_fused) for width in WIDTHS)
    by_column = (wide - narrow) / (WIDTHS[1] - WIDTHS[0])
    waits_by_column = (waits - narrow_waits) / (WIDTHS[1] - WIDTHS[0])
    launches, all_waits = 0.0, 0.0
    for num_rows, width, num_stacks in stacks.values():
        passes = num_stacks * math.ceil(num_rows / tile(width))
        launches += passes * (wide + (width - WIDTHS[1]) * by_column)
        all_waits += passes * (waits + (width - WIDTHS[1]) * waits_by_column)
    return round(launches), round(all_waits)


def rows_on_cpu(width: int) -> int:
    """Rows that a CPU decides together."""
    return rows_module.ROW_TILE


def rows_on_gpu(width: int) -> int:
    """Rows that a GPU decides together."""
    return rows_module.rows_together(torch.empty(0, width, device="meta"))


def table(hidden: int, intermediate: int, kv: int, experts: int) -> Mapping[str, Mapping[str, Any]]:
    """By scheme: launches of the loop with the rows of a CPU and with those of a GPU, and of the
    kernels; and how often the host waits then.
    """
    stacks = {
        "q, k and v": (hidden + 2 * kv, hidden, 1),
        "o": (hidden, hidden, 1),
        "gate and up": (2 * intermediate, hidden, experts),
        "down": (hidden, intermediate, experts),
    }
    found = {}
    for name, fit in FITS.items():
        sliced, _ = of_block(fit, stacks, False, rows_on_cpu)
        loop, _ = of_block(fit, stacks, False, rows_on_gpu)
        fused, waits = of_block(fit, stacks, True, rows_on_gpu)
        found[name] = {
            "loop, rows in slices": sliced,
            "loop, all rows": loop,
            "kernels": fused,
            "of the first": f"1/{sliced / fused:.0f}",
            "waits": waits,
        }
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=14336)
    parser.add_argument("--kv", type=int, default=1024)
    parser.add_argument("--experts", type=int, default=1)
    for scheme, row in table(**vars(parser.parse_args())).items():
        print(scheme, row)
