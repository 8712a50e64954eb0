"""Launches of kernels for error feedback on one block of a model, with torch's operators alone and
with kernels in Triton.

    python benchmarks/launches.py [--hidden N] [--intermediate N] [--kv N]
        [--experts N] [--together N]

They are counted on a CPU, and not measured on a GPU: every operator of torch that computes is taken
for one launch, views for none. Of a layer, the number depends on how often some of its rows are
decided, and is linear in its width: it is counted for two widths. So is that of experts that are
solved together. Operators that let the host wait for a number are counted by themselves.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest.mock import patch

import torch
from attrs import frozen
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from bitpress import Layer, numerics
from bitpress.numerics import cholesky, hessian, kernel_trial, rows as rows_module
from bitpress.numerics.gptq import Fit
from bitpress.runtime.batching import map_batched
from bitpress_nvfp4 import scales

# Widths at which a layer is counted.
WIDTHS = (512, 1024)
# Of the layer: any number of them that has all groups.
ROWS = 64
# From gradients of so many tokens, rows are decided in 16 groups.
GRADIENT_TOKENS = 8192
# Operators that copy one number to the host.
WAITS = ("aten::_local_scalar_dense", "aten::equal", "numbers read")
# What is copied where scales are fitted in a kernel, side by side for layers that are together.
COPIES_OF_REFIT = 6
# A number of the host becomes a tensor there.
FREE = ("aten::empty", "aten::new_empty", "aten::scalar_tensor")

FITS: Mapping[str, Fit[Any]] = {
    "w4a16": lambda w, importance: numerics.fit_symmetric(
        w, importance, 4, 128, (0.9, 1.0), dtype=torch.bfloat16
    ),
    "int8": lambda w, importance: numerics.fit_symmetric(w, importance, 8, w.shape[1], (0.9, 1.0)),
    "nvfp4": lambda w, importance: scales.fit(w, importance, torch.tensor(100.0)),
}


@frozen
class Stack:
    """Layers of a block that are solved as one; so many such stacks, some of them together."""

    rows: int
    width: int
    number: int = 1
    together: int = 1


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

    def refit_layers(refits: Sequence[Any]) -> list[Tensor]:
        # copies side by side, and of each group a product and a kernel
        counts["kernel"] += COPIES_OF_REFIT + 2 * refits[0].units.shape[1]
        with _disable_current_modes():
            return [refit.rule.scale * 1.01 for refit in refits]

    with (
        patch.object(kernel_trial, "can_fuse", lambda device: True),
        patch.object(fused_sweep.BlockSweep, "decide", decide),
        patch.object(fused_refit, "_refit_layers", refit_layers),
    ):
        yield


@contextlib.contextmanager
def reads(counts: collections.Counter[str]) -> Iterator[None]:
    """Numbers that are read together are counted as one wait."""
    read = Tensor.tolist

    def count_and_read(numbers: Tensor) -> Any:
        counts["numbers read"] += 1
        return read(numbers)

    with patch.object(Tensor, "tolist", count_and_read):
        yield


def count(fit: Fit[Any], width: int, is_fused: bool, together: int = 1) -> tuple[int, int]:
    """Launches and waits for layers that are solved together, whose rows are decided once, in
    groups.
    """
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(ROWS, width, generator=draw) * 0.02
    stats = numerics.gptq_statistics(torch.randn(width, width, generator=draw), weight)
    stats |= numerics.output_statistics(torch.randn(GRADIENT_TOKENS, ROWS, generator=draw))
    layers = [Layer("layer", weight, torch.bfloat16)] * together
    with (
        # as on a GPU
        patch.object(numerics.Factor, "covers", lambda self, cost, error: cost <= self.loss(error)),
        patch.object(hessian, "cholesky_", cholesky._factorize_together)
        if together > 1
        else contextlib.nullcontext(),
        Launches() as seen,
        kernels(seen.counts) if is_fused else contextlib.nullcontext(),
        reads(seen.counts),
    ):
        map_batched(lambda layer: numerics.gptq_quantize(layer, stats, fit), layers)
    return seen.launches, seen.waits


def of_block(
    fit: Fit[Any], stacks: Sequence[Stack], is_fused: bool, tile: Callable[[int], int]
) -> tuple[int, int]:
    """Launches and waits for a block.

    Args:
        tile: from a width to the rows of a layer that are decided together.
    """
    launches, all_waits = 0.0, 0.0
    for stack in stacks:
        counts = [count(fit, width, is_fused, stack.together) for width in WIDTHS]
        passes = stack.number / stack.together * math.ceil(stack.rows / tile(stack.width))
        launches += passes * _at_width(stack.width, [launches for launches, _ in counts])
        all_waits += passes * _at_width(stack.width, [waits for _, waits in counts])
    return round(launches), round(all_waits)


def _at_width(width: int, counts: Sequence[int]) -> float:
    """A number that is linear in the width, known for two widths."""
    (narrow, wide), (few, many) = WIDTHS, counts
    return many + (width - wide) * (many - few) / (wide - narrow)


def rows_on_cpu(width: int) -> int:
    """Rows that a CPU decides together."""
    return rows_module.LOOP_ROWS


def rows_on_gpu(width: int) -> int:
    """Rows that a GPU decides together."""
    target = torch.empty(0, width, device="meta")
    return rows_module.rows_decided_together(target, has_rule=True)


def table(
    hidden: int, intermediate: int, kv: int, experts: int, together: int
) -> Mapping[str, Mapping[str, Any]]:
    """By scheme: launches of the loop with the rows of a CPU and with those of a GPU, and of the
    kernels; and how often the host waits then.
    """
    stacks = [
        # queries, keys and values; outputs; gate and up; down
        Stack(hidden + 2 * kv, hidden),
        Stack(hidden, hidden),
        Stack(2 * intermediate, hidden, experts, together),
        Stack(hidden, intermediate, experts, together),
    ]
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
    parser.add_argument("--together", type=int, default=1)
    for scheme, row in table(**vars(parser.parse_args())).items():
        print(scheme, row)
