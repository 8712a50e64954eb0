"""Makes language models on disk smaller, one scheme package at a time.

What plugin authors need (`Layer`, `StoredLayer`, `hookimpl`, ...) imports no torch; the functions
that do the work (`compress`, `plan`, `recommend`, `verify`, `decompress`, `inspect`, `report`,
`eval`, `search`) are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from bitpress.checkpoint.quantized_source import QuantizedSource, QuantizedWeight, StoredPart
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
from bitpress.schemes.deprecation import warn_renamed
from bitpress.schemes.hardware import Hardware
from bitpress.schemes.hookspecs import hookimpl
from bitpress.schemes.options import Options, ReferenceOptions, option
from bitpress.schemes.values import (
    CodeForm,
    Finding,
    Layer,
    MeasuredLoss,
    QuantizedTensor,
    Statistic,
    StoredLayer,
)

if TYPE_CHECKING:
    from bitpress.api import (
        compress,
        decompress,
        evaluate as eval,
        inspect,
        plan,
        recommend,
        report,
        search,
        verify,
    )

__all__ = [
    "BitpressError",
    "CheckpointError",
    "CodeForm",
    "DataError",
    "Finding",
    "Hardware",
    "Layer",
    "MeasuredLoss",
    "Options",
    "OutputError",
    "QuantizedSource",
    "QuantizedTensor",
    "QuantizedWeight",
    "RecipeError",
    "ReferenceOptions",
    "SchemeError",
    "ShapeError",
    "Statistic",
    "StoredLayer",
    "StoredPart",
    "VerificationError",
    "compress",
    "decompress",
    "eval",
    "hookimpl",
    "inspect",
    "option",
    "plan",
    "recommend",
    "report",
    "search",
    "verify",
]

# functions of `api`, which imports torch: imported when they are first used
_API = (
    "compress",
    "decompress",
    "eval",
    "inspect",
    "plan",
    "recommend",
    "report",
    "search",
    "verify",
)


# Names of release 0.1, which work in this release still.
_OLD_NAMES = {"Record": "StoredLayer", "Stat": "Statistic"}


def __getattr__(name: str) -> Any:
    if name in _OLD_NAMES:
        warn_renamed(f"bitpress.{name}", f"bitpress.{_OLD_NAMES[name]}")
        return globals()[_OLD_NAMES[name]]
    if name in _API:
        return getattr(
            importlib.import_module("bitpress.api"), "evaluate" if name == "eval" else name
        )
    raise AttributeError(f"module 'bitpress' has no attribute {name!r}")
