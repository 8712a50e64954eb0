"""Number formats and roundings for schemes: functions on tensors, torch only.

Importing this package is cheap; torch is imported when a function is first used, so that a scheme's
module can say `from bitpress import numerics` and still be listed in an instant.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitpress.numerics.blocks import absmax, block_absmax, expand
    from bitpress.numerics.columns import sweep
    from bitpress.numerics.fp4 import E2M1_MAX, decode_e2m1, encode_e2m1, round_e2m1
    from bitpress.numerics.fp8 import E4M3_MAX, decode_e4m3, e4m3_bound, e4m3_scale, encode_e4m3
    from bitpress.numerics.gptq import Grid, aim, feedback, moments
    from bitpress.numerics.hessian import Factor, factor
    from bitpress.numerics.histogram import (
        clip,
        clip_by_error,
        clip_by_share,
        magnitudes,
        middle_magnitude,
    )
    from bitpress.numerics.integer import (
        IntegerGrid,
        decode_integers,
        fit_asymmetric,
        fit_symmetric,
        limits,
    )
    from bitpress.numerics.least_squares import reconstruct
    from bitpress.numerics.packing import pack_bytes, pack_words, unpack_bytes, unpack_words
    from bitpress.numerics.scale_search import grouped, rounding_costs, search

_HOME = {
    **dict.fromkeys(("absmax", "block_absmax", "expand"), "blocks"),
    **dict.fromkeys(
        ("clip", "clip_by_error", "clip_by_share", "magnitudes", "middle_magnitude"), "histogram"
    ),
    **dict.fromkeys(("Grid", "aim", "feedback", "moments"), "gptq"),
    **dict.fromkeys(("E4M3_MAX", "decode_e4m3", "e4m3_bound", "e4m3_scale", "encode_e4m3"), "fp8"),
    **dict.fromkeys(("Factor", "factor"), "hessian"),
    **dict.fromkeys(
        ("IntegerGrid", "decode_integers", "fit_asymmetric", "fit_symmetric", "limits"), "integer"
    ),
    **dict.fromkeys(("E2M1_MAX", "decode_e2m1", "encode_e2m1", "round_e2m1"), "fp4"),
    **dict.fromkeys(("pack_bytes", "pack_words", "unpack_bytes", "unpack_words"), "packing"),
    **dict.fromkeys(("grouped", "rounding_costs", "search"), "scale_search"),
    "reconstruct": "least_squares",
    "sweep": "columns",
}

__all__ = [
    "E2M1_MAX",
    "E4M3_MAX",
    "Factor",
    "Grid",
    "IntegerGrid",
    "absmax",
    "aim",
    "block_absmax",
    "clip",
    "clip_by_error",
    "clip_by_share",
    "decode_e2m1",
    "decode_e4m3",
    "decode_integers",
    "e4m3_bound",
    "e4m3_scale",
    "encode_e2m1",
    "encode_e4m3",
    "expand",
    "factor",
    "feedback",
    "fit_asymmetric",
    "fit_symmetric",
    "grouped",
    "limits",
    "magnitudes",
    "middle_magnitude",
    "moments",
    "pack_bytes",
    "pack_words",
    "reconstruct",
    "round_e2m1",
    "rounding_costs",
    "search",
    "sweep",
    "unpack_bytes",
    "unpack_words",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'bitpress.numerics' has no attribute {name!r}")
    return getattr(importlib.import_module(f"bitpress.numerics.{_HOME[name]}"), name)
