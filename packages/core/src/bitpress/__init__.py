"""Makes language models on disk smaller, one scheme package at a time.

What plugin authors need (`Layer`, `Record`, `hookimpl`, ...) imports no torch; the functions that do the work (`compress`,
`plan`, `verify`, `decompress`, `inspect`) are imported when they are first used.
"""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from bitpress.errors import (
    BitpressError,
    CheckpointError,
    DataError,
    OutputError,
    RecipeError,
    SchemeError,
    ShapeError,
    VerificationError,
)
from bitpress.hardware import Hardware
from bitpress.hookspecs import hookimpl
from bitpress.layer import Finding, Layer, Record, Stat
from bitpress.options import Options, option

if TYPE_CHECKING:
    from bitpress.run import compress, decompress, inspect, plan, verify

__version__ = version("bitpress-core")
__all__ = [
    "BitpressError",
    "CheckpointError",
    "DataError",
    "Finding",
    "Hardware",
    "Layer",
    "Options",
    "OutputError",
    "RecipeError",
    "Record",
    "SchemeError",
    "ShapeError",
    "Stat",
    "VerificationError",
    "compress",
    "decompress",
    "hookimpl",
    "inspect",
    "option",
    "plan",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in ("compress", "decompress", "inspect", "plan", "verify"):
        return getattr(importlib.import_module("bitpress.run"), name)
    raise AttributeError(f"module 'bitpress' has no attribute {name!r}")
