"""Whether kernels in Triton are used on a device."""

from __future__ import annotations

import functools
import importlib.util
import warnings

import torch

from bitpress.errors import first_line


@functools.cache
def can_fuse(device: torch.device) -> bool:
    """Whether kernels follow rules there: on a GPU where Triton is installed, and a trial of the
    sweep gives what a CPU gives.
    """
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    try:
        from bitpress.numerics import fused_sweep

        problem = None if fused_sweep.is_exact_on(device) else "it gives other numbers than a CPU"
    # whatever stops Triton, from a missing compiler to an old driver, the loop does without it
    except Exception as e:
        problem = first_line(e)
    if problem is not None:
        warnings.warn(
            f"columns are decided one by one, which takes longer: Triton on {device}: {problem}",
            stacklevel=2,
        )
    return problem is None
