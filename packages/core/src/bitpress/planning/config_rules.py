"""What loaders demand of the quantization config itself, whatever the files hold."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from bitpress.checkpoint.filenames import CONFIG
from bitpress.errors import Fault
from bitpress.planning.expression_cost import may_take_long


def find_table_faults(table: Mapping[str, Any]) -> Iterator[Fault]:
    """Whether loaders take the table for compressed-tensors, and its formats agree."""
    if table.get("quant_method") != "compressed-tensors":
        yield Fault(
            CONFIG,
            f"quant_method is {table.get('quant_method')!r}, not 'compressed-tensors'",
        )

    # transformers initializes compressed layers at random under any other status.
    if table.get("quantization_status") != "compressed":
        yield Fault(
            CONFIG,
            "quantization_status is not 'compressed': transformers would leave random weights, "
            "without an error",
        )

    formats = {
        group.get("format")
        for group in (table.get("config_groups") or {}).values()
        if isinstance(group, dict)
    }
    expected = next(iter(formats)) if len(formats) == 1 else "mixed-precision"
    # a config may be about the cache alone
    if not formats and table.get("kv_cache_scheme"):
        expected = "dense"
    if not formats and not table.get("kv_cache_scheme"):
        yield Fault(CONFIG, "it has no config_groups")
    elif table.get("format") != expected:
        yield Fault(
            CONFIG,
            f"its format is {table.get('format')!r}, and those of its groups are "
            f"{', '.join(map(str, formats))}",
        )


def find_name_faults(table: Mapping[str, Any]) -> Iterator[Fault]:
    """Whether the lists of layers hold names, and expressions that do not take forever to match."""
    lists = {"ignore": table.get("ignore")}
    for name, group in (table.get("config_groups") or {}).items():
        lists[f"{name}.targets"] = group.get("targets") if isinstance(group, dict) else None
    for place, names in lists.items():
        if names is not None and not isinstance(names, list):
            yield Fault(CONFIG, f"its {place} is no list of names")
            continue
        for name in names or ():
            if not isinstance(name, str):
                yield Fault(CONFIG, f"its {place} holds {name!r:.60}, which is no name")
            elif name.startswith("re:") and (reason := explain_expression(name[3:])):
                yield Fault(CONFIG, f"its {place} holds {name!r:.200}, {reason}")


def explain_expression(pattern: str) -> str | None:
    """Why a regular expression of a config is not used, as the end of a sentence about it; None
    where it is.
    """
    try:
        re.compile(pattern)
    except re.error as e:
        return f"which is no regular expression ({e})"
    return "which may take forever to match" if may_take_long(pattern) else None
