"""Stacks of which a source's codes are stored as they are, whatever algorithm the recipe names: a
second rounding would only lose.
"""

from __future__ import annotations

from collections.abc import Mapping

from attrs import evolve

from bitpress.checkpoint.dequantized_source import DequantizedView
from bitpress.checkpoint.reader import DTYPES
from bitpress.checkpoint.safetensors import Entry
from bitpress.planning.layout import Stack
from bitpress.schemes import hook_results
from bitpress.schemes.options import Options
from bitpress.schemes.registry import Scheme, Step


def keep_codes(stacks: Mapping[str, Stack]) -> dict[str, Stack]:
    """The stacks, those with the options that keep codes whose schemes can store them to the bit.

    Raises:
        SchemeError: a scheme's hook failed.
    """
    # layers that are stored alike have one step, by which what is known of it is found again
    steps: dict[tuple[Scheme, Options], Step] = {}
    kept = {}
    for name, stack in stacks.items():
        options = _common_options(stack)
        kept[name] = stack
        if options is not None:
            scheme = stack.steps[0].scheme
            step = steps.setdefault((scheme, options), Step(scheme, options))
            kept[name] = evolve(stack, steps=(step,), keeps_codes=True)
    return kept


def _common_options(stack: Stack) -> Options | None:
    """The options with which the codes of all members are kept; None where there are none."""
    # what a step before another makes of a weight are no codes of the source
    if len(stack.steps) != 1:
        return None
    options = [_ask(stack.steps[0], entry) for entry in stack.members.values()]
    return options[0] if all(other == options[0] for other in options) else None


def _ask(step: Step, entry: Entry) -> Options | None:
    form = entry.weight.form if isinstance(entry, DequantizedView) else None
    if form is None:
        return None
    shape = (entry.shape[0], entry.shape[1])
    result = step.call("keep_codes", form=form, shape=shape, dtype=DTYPES[entry.dtype])
    return hook_results.check_options(step, result)
