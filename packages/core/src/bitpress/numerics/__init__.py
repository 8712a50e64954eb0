"""Number formats and roundings for schemes: functions on tensors, torch only.

Importing this package is cheap; torch is imported when a function is first used, so that a scheme's module can say
`from bitpress import numerics` and still be listed in an instant.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitpress.numerics.blocks import absmax, block_absmax, expand
    from bitpress.numerics.float8 import E4M3_MAX, decode_e4m3, e4m3_bound, e4m3_scale, encode_e4m3

_HOME = {"absmax": "blocks", "block_absmax": "blocks", "expand": "blocks"} | dict.fromkeys(
    ("E4M3_MAX", "decode_e4m3", "e4m3_bound", "e4m3_scale", "encode_e4m3"), "float8"
)
__all__ = ["E4M3_MAX", "absmax", "block_absmax", "decode_e4m3", "e4m3_bound", "e4m3_scale", "encode_e4m3", "expand"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'bitpress.numerics' has no attribute {name!r}")
    return getattr(importlib.import_module(f"bitpress.numerics.{_HOME[name]}"), name)
