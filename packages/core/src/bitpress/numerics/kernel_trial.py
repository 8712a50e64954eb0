"""Whether compiled kernels are used on a device, and the memory that they take."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from types import ModuleType

import torch

from bitpress.errors import first_line
from bitpress.numerics.rounding_rule import NumberFormat, RoundingRule
from bitpress.numerics.swept_columns import SweptColumns

# Of the weight that a trial sweeps.
ROWS = 32

# Bytes that Numba takes, with the kernels that it has compiled.
NUMBA_BYTES = 200_000_000


@functools.cache
def can_fuse(device: torch.device) -> bool:
    """Whether kernels in Triton follow rules there: on a GPU where it is installed, and a trial of
    the sweep gives what torch gives on a CPU.
    """
    return device.type == "cuda" and _passes_trial("Triton", "fused_sweep", device)


@functools.cache
def can_compile(device: torch.device) -> bool:
    """Whether kernels compiled by Numba follow rules there: on a CPU where it is installed, and a
    trial of the sweep gives what torch gives.
    """
    return device.type == "cpu" and _passes_trial("Numba", "compiled_sweep", device)


def compiler_bytes() -> int:
    """Bytes that compiled kernels take in the memory of a host, where they may be used."""
    return NUMBA_BYTES if _is_installed("Numba") else 0


def _passes_trial(compiler: str, module: str, device: torch.device) -> bool:
    if not _is_installed(compiler):
        return False
    try:
        kernels = importlib.import_module(f"bitpress.numerics.{module}")
        problem = None if is_exact(kernels, device) else "it gives other numbers than torch"
    # whatever stops a compiler, from a missing one of C to an old driver, the loop does without it
    except Exception as e:
        problem = first_line(e)
    if problem is not None:
        warnings.warn(
            "columns are decided one by one, which takes longer: "
            f"{compiler} on {device}: {problem}",
            stacklevel=3,
        )
    return problem is None


def _is_installed(compiler: str) -> bool:
    return importlib.util.find_spec(compiler.lower()) is not None


def is_exact(kernels: ModuleType, device: torch.device) -> bool:
    """Whether a block of a small weight becomes what torch's functions make of it on a CPU."""
    draw, block = torch.Generator().manual_seed(0), kernels.BLOCK
    unit = torch.randn(block, block, generator=draw).mul_(0.1)
    weight = torch.randn(block, ROWS, generator=draw)  # (in, rows)
    scale = torch.rand(ROWS, 1, generator=draw).add_(0.1)
    target, expected = weight.clone(), torch.empty_like(weight)
    for k in range(block):
        expected[k] = (target[k] / scale[:, 0]).round_().clamp_(-8, 7).mul_(scale[:, 0])
        target[k + 1 :].addcmul_(unit[k, k + 1 :].unsqueeze(1), weight[k] - expected[k])

    order = torch.arange(block, device=device)
    columns = SweptColumns.undecided([weight.T.to(device)], [order], block)
    rule = RoundingRule(NumberFormat(-8, 7), scale.to(device), block)
    kernels.BlockSweep(columns, unit.to(device).unsqueeze(0), [rule]).decide(next(columns.waves))
    return torch.equal(columns.projected.flatten(1).cpu(), expected)
