"""Makes language models on disk smaller, one scheme package at a time.

What plugin authors need (`Layer`, `Record`, `hookimpl`, ...) imports no torch; the functions that
do the work (`compress`, `plan`, `verify`, `decompress`, `inspect`, `eval`, `search`) are imported
when they are first used.
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
    from bitpress.budget.search import search
    from bitpress.outputs import decompress, evaluate as eval, inspect, verify
    from bitpress.run import compress, plan

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
    "eval",
    "hookimpl",
    "inspect",
    "option",
    "plan",
    "search",
    "verify",
]


_HOME = {
    **dict.fromkeys(("compress", "plan"), "run"),
    **dict.fromkeys(("decompress", "eval", "inspect", "verify"), "outputs"),
    "search": "budget.search",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(
            importlib.import_module(f"bitpress.{_HOME[name]}"),
            "evaluate" if name == "eval" else name,
        )
    raise AttributeError(f"module 'bitpress' has no attribute {name!r}")
