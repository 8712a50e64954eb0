"""What a run of a plan takes: memory, and room on the disk."""

from __future__ import annotations

from bitpress.calibrate.memory import RUNTIME as CALIBRATED_RUNTIME, estimate
from bitpress.calibrate.texts import Choice
from bitpress.compute import cores
from bitpress.planning import Plan

# bytes of memory that Python with torch takes before any work
RUNTIME = 450_000_000


def memory(
    work: Plan, threads: int | None = None, tokens: int = Choice().samples * Choice().length
) -> int:
    """Bytes that a run of the plan holds at least, Python and its libraries included.

    A calibrated run takes more where it may, for speed.
    """
    if work.recipe.calibrated:
        return CALIBRATED_RUNTIME + estimate(work, tokens).least
    return RUNTIME + work.memory(threads or cores())


def scratch(work: Plan, tokens: int = Choice().samples * Choice().length) -> int:
    """Bytes that a run may keep on disk beside the output, where it is allowed no more memory than
    it needs at least.
    """
    if not work.recipe.calibrated:
        return 0
    need = estimate(work, tokens)
    return need.held - need.least


def disk(work: Plan, tokens: int = 0, max_memory: int | None = None, ranks: int = 1) -> int:
    """Bytes that a run of the plan needs room for in its output folder, hidden states that do not
    fit into memory included.

    Args:
        tokens: of one rank.
        max_memory: of one rank.
    """
    limit = None if max_memory is None else max_memory - CALIBRATED_RUNTIME
    return sum(work.sizes.values()) + (
        ranks * estimate(work, tokens).spilled(limit) if tokens else 0
    )
