"""Number formats and roundings for schemes: functions on tensors, torch only.

Importing this package is cheap; torch is imported when a function is first used, so that a scheme's
module can say `from bitpress import numerics` and still be listed in an instant.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bitpress.schemes.deprecation import warn_renamed

if TYPE_CHECKING:
    from bitpress.numerics.blocks import absmax, block_absmax, expand_blocks
    from bitpress.numerics.columns import column_sweep
    from bitpress.numerics.e8m0 import decode_e8m0, encode_e8m0, power_above
    from bitpress.numerics.exact import power_of_two, scalar_like
    from bitpress.numerics.float_grid import FloatGrid, scale_groups
    from bitpress.numerics.fp4 import E2M1_MAX, decode_e2m1, e2m1_bound, encode_e2m1, round_e2m1
    from bitpress.numerics.fp8 import (
        E4M3_MAX,
        decode_e4m3,
        e4m3_bound,
        e4m3_scale,
        e4m3_step,
        encode_e4m3,
        round_e4m3,
        round_rows_e4m3,
    )
    from bitpress.numerics.gptq import Grid, gptq_quantize, gptq_statistics, gptq_target
    from bitpress.numerics.hessian import Factor, factorize_hessian
    from bitpress.numerics.histogram import (
        clip_by_error,
        clip_by_share,
        clip_range,
        input_absmax,
        magnitude_histogram,
        median_magnitude,
        observe_range,
    )
    from bitpress.numerics.int8 import int8_range, int8_scale, round_int8, round_tokens_int8
    from bitpress.numerics.integer import (
        IntegerGrid,
        decode_integers,
        fit_asymmetric,
        fit_symmetric,
        integer_bound,
        integer_range,
    )
    from bitpress.numerics.least_squares import masked_least_squares
    from bitpress.numerics.output_hessian import (
        RowFactor,
        damped_output_hessian,
        factorize_output_hessian,
        output_statistics,
    )
    from bitpress.numerics.packing import pack_bytes, pack_words, unpack_bytes, unpack_words
    from bitpress.numerics.rounding_rule import E2M1, E4M3, NumberFormat, RoundingRule, RuledGrid
    from bitpress.numerics.rows import decide_rows
    from bitpress.numerics.scale_refit import ScaledGrid
    from bitpress.numerics.scale_search import (
        rounding_costs,
        search_scales,
        table_for_device,
        to_groups,
    )

# The public names, by the module that defines them.
_MODULES: Mapping[str, Sequence[str]] = {
    "blocks": ("absmax", "block_absmax", "expand_blocks"),
    "columns": ("column_sweep",),
    "e8m0": ("decode_e8m0", "encode_e8m0", "power_above"),
    "exact": ("power_of_two", "scalar_like"),
    "float_grid": ("FloatGrid", "scale_groups"),
    "fp4": ("E2M1_MAX", "decode_e2m1", "e2m1_bound", "encode_e2m1", "round_e2m1"),
    "fp8": (
        "E4M3_MAX",
        "decode_e4m3",
        "e4m3_bound",
        "e4m3_scale",
        "e4m3_step",
        "encode_e4m3",
        "round_e4m3",
        "round_rows_e4m3",
    ),
    "gptq": ("Grid", "gptq_quantize", "gptq_statistics", "gptq_target"),
    "hessian": ("Factor", "factorize_hessian"),
    "histogram": (
        "clip_by_error",
        "clip_by_share",
        "clip_range",
        "input_absmax",
        "magnitude_histogram",
        "median_magnitude",
        "observe_range",
    ),
    "int8": ("int8_range", "int8_scale", "round_int8", "round_tokens_int8"),
    "integer": (
        "IntegerGrid",
        "decode_integers",
        "fit_asymmetric",
        "fit_symmetric",
        "integer_bound",
        "integer_range",
    ),
    "least_squares": ("masked_least_squares",),
    "output_hessian": (
        "RowFactor",
        "damped_output_hessian",
        "factorize_output_hessian",
        "output_statistics",
    ),
    "packing": ("pack_bytes", "pack_words", "unpack_bytes", "unpack_words"),
    "rounding_rule": ("E2M1", "E4M3", "NumberFormat", "RoundingRule", "RuledGrid"),
    "rows": ("decide_rows",),
    "scale_refit": ("ScaledGrid",),
    "scale_search": ("rounding_costs", "search_scales", "table_for_device", "to_groups"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

# Names of release 0.1, which work in this release still.
_OLD_NAMES = {
    "aim": "gptq_target",
    "clip": "clip_range",
    "expand": "expand_blocks",
    "factor": "factorize_hessian",
    "feedback": "gptq_quantize",
    "grouped": "to_groups",
    "limits": "integer_range",
    "magnitudes": "magnitude_histogram",
    "middle_magnitude": "median_magnitude",
    "moments": "gptq_statistics",
    "reconstruct": "masked_least_squares",
    "search": "search_scales",
    "sweep": "column_sweep",
}

__all__ = [
    "E2M1",
    "E2M1_MAX",
    "E4M3",
    "E4M3_MAX",
    "Factor",
    "FloatGrid",
    "Grid",
    "IntegerGrid",
    "NumberFormat",
    "RoundingRule",
    "RowFactor",
    "RuledGrid",
    "ScaledGrid",
    "absmax",
    "block_absmax",
    "clip_by_error",
    "clip_by_share",
    "clip_range",
    "column_sweep",
    "damped_output_hessian",
    "decide_rows",
    "decode_e2m1",
    "decode_e4m3",
    "decode_e8m0",
    "decode_integers",
    "e2m1_bound",
    "e4m3_bound",
    "e4m3_scale",
    "e4m3_step",
    "encode_e2m1",
    "encode_e4m3",
    "encode_e8m0",
    "expand_blocks",
    "factorize_hessian",
    "factorize_output_hessian",
    "fit_asymmetric",
    "fit_symmetric",
    "gptq_quantize",
    "gptq_statistics",
    "gptq_target",
    "input_absmax",
    "int8_range",
    "int8_scale",
    "integer_bound",
    "integer_range",
    "magnitude_histogram",
    "masked_least_squares",
    "median_magnitude",
    "observe_range",
    "output_statistics",
    "pack_bytes",
    "pack_words",
    "power_above",
    "power_of_two",
    "round_e2m1",
    "round_e4m3",
    "round_int8",
    "round_rows_e4m3",
    "round_tokens_int8",
    "rounding_costs",
    "scalar_like",
    "scale_groups",
    "search_scales",
    "table_for_device",
    "to_groups",
    "unpack_bytes",
    "unpack_words",
]


def __getattr__(name: str) -> Any:
    if name in _OLD_NAMES:
        warn_renamed(f"bitpress.numerics.{name}", f"bitpress.numerics.{_OLD_NAMES[name]}")
        name = _OLD_NAMES[name]
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'bitpress.numerics' has no attribute {name!r}")
    return getattr(importlib.import_module(f"bitpress.numerics.{_MODULE_OF[name]}"), name)
